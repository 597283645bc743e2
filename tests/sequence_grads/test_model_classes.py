"""Transformers' causal language models, by benchmarks/architectures.py: right, or refused, and never wrong."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import judge  # noqa: E402

RESULTS = json.loads((ROOT / "results" / "architectures.json").read_text())["results"]
SAMPLE = [
    "BloomForCausalLM",
    "Cohere2ForCausalLM",
    "DbrxForCausalLM",
    "DeepseekV4ForCausalLM",
    "DogeForCausalLM",
    "FalconForCausalLM",
    "Gemma2ForCausalLM",
    "Glm4MoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "JetMoeForCausalLM",
    "Llama4ForCausalLM",
    "MiniMaxForCausalLM",
    "MptForCausalLM",
    "OlmoeForCausalLM",
    "Phi3ForCausalLM",
    "RecurrentGemmaForCausalLM",
    "RwkvForCausalLM",
    "Starcoder2ForCausalLM",
    "Zamba2ForCausalLM",
    "xLSTMForCausalLM",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample(name):
    found = judge(name)
    assert found["verdict"] in ("rule", "general"), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [entry for entry in RESULTS if entry["class"] not in SAMPLE], ids=lambda e: e["class"]
)
def test_every_class_is_as_documented(entry):
    if entry["verdict"] == "not buildable":
        pytest.skip(entry["reason"])
    assert judge(entry["class"])["verdict"] == entry["verdict"]
