"""The fused head with TRL's Triton kernels, in Triton's interpreter, on a CPU that passes for a GPU."""

import os

import pytest
import torch
from support import oracle
from support.accelerator import accelerating
from support.harness import definition, inputs_for, make_inputs, make_model, make_trainer, trainer_gradients
from transformers.utils import is_triton_available

if not is_triton_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton and its interpreter: `make test-triton`", allow_module_level=True)

import trl.kernels.chunked_logprob as kernels

from proma_trl.trainer import trl_internals


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """How often each kernel ran."""
    counts = {"_forward_kernel": 0, "_backward_kernel": 0}

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)
            self.fn = self.kernel.fn

        def __getitem__(self, grid):
            counts[self.name] += 1
            return self.kernel[grid]

    for name in counts:
        monkeypatch.setattr(kernels, name, Counted(name))
    monkeypatch.setattr(kernels, "_use_triton", lambda device: True, raising=False)
    monkeypatch.setattr(trl_internals, "_has_kernel", lambda device: True)
    with accelerating():
        yield counts


@pytest.mark.parametrize("settings", [{}, {"projection_memory_budget": 1e-5}, {"intra_dim": 3}], ids=str)
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gemma2-softcap", "cohere", "gptj"])
def test_gradients(architecture, settings, tmp_path, launches, monkeypatch):
    """Soft-capping, logit scales, a biased head, temperature, and ranges of the vocabulary."""
    monkeypatch.setattr("proma_trl.trainer.fused_head._TILE_ELEMENTS_ACCELERATED", 28 * 33)
    trainer = make_trainer(tmp_path, make_model(architecture), temperature=0.7, **settings)
    microbatches = inputs_for(architecture, 4)[:2]
    found, _ = trainer_gradients(trainer, microbatches)
    assert launches["_forward_kernel"] > 0 and launches["_backward_kernel"] > 2
    if "intra_dim" not in settings:
        oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)))
        return
    monkeypatch.setattr(kernels, "_use_triton", lambda device: False)
    monkeypatch.setattr(trl_internals, "_has_kernel", lambda device: False)
    trainer.accumulation.load_state_dict({"rule": {}, "step": 0})
    without, _ = trainer_gradients(trainer, microbatches)
    for name, want in without.items():
        assert torch.allclose(found[name], want, rtol=1e-3, atol=1e-4 * float(want.abs().max())), name


def test_no_scored_token(tmp_path, launches):
    microbatches = [make_inputs(4, seed) for seed in range(2)]
    microbatches[1]["completion_mask"].zero_()
    trainer = make_trainer(tmp_path)
    found, _ = trainer_gradients(trainer, microbatches)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)))
