"""Settings that hold for every test: no network, no trackers, few threads, and a CPU suffices for each TRL."""

import gc
import os
from importlib.metadata import version
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if find_spec("vllm") is None:
    # vLLM needs the compiler. Elsewhere DeepSpeed alone imports it, in seconds, for an optimizer that no test uses
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread for each, and for the programs that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import support  # noqa: F401 - before any test asks Accelerate for a package
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


# The fused head of TRL 1.15 is in Triton alone
TRITON_ALONE = version("trl").startswith("1.15.")
if TRITON_ALONE:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=TRITON_ALONE)
def torch_kernels(request, monkeypatch):
    """In the place of that Triton, which takes minutes in its interpreter, in all tests but those of it."""
    if request.path.name == "test_triton.py":
        return
    from support.triton_kernels import Launched, backward_kernel, forward_kernel
    from trl.kernels import chunked_logprob

    for name, function in (("_forward_kernel", forward_kernel), ("_backward_kernel", backward_kernel)):
        monkeypatch.setattr(chunked_logprob, name, Launched(function, getattr(chunked_logprob, name)))


def pytest_collection_finish():
    """Trainers collect garbage when they begin: they need not search the objects of what was imported."""
    gc.collect()
    gc.freeze()
