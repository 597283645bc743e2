"""vLLM's CPU build as an engine whose weights can be replaced, and a policy that it can run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# One process: the engine is built in the trainer's, as on a GPU
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

sys.path.insert(0, str(Path(__file__).parents[1]))

import importlib.util

import pytest
import torch


def keep_weights(layer, remove_weight):
    """vLLM's CPU layers pack their weights and drop them, so that no others can be loaded: compute without packing."""
    layer.cpu_linear = torch.nn.functional.linear


if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]  # `make test-vllm` has it
else:
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = keep_weights


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """The folder of a tiny random Qwen3, with the smallest heads that vLLM takes."""
    from support.tiny import make_policy, make_tokenizer

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64, "max_position_embeddings": 256}
    model = make_policy(tokenizer, **sizes)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
