"""The accumulation in a plain PyTorch loop, against the float64 definition."""

import copy

import pytest
import torch
from accelerate import Accelerator
from support import oracle
from support.models import ARCHITECTURES, tiny_model
from support.sequences import accumulate, expected, lora, make_batch, make_batches, objectives

from proma_trl import ProjectedAccumulation, ProjectionSettings


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


SETTINGS = {
    "exact": {"method": "exact"},
    "none": {"method": "none"},
    "unbounded": {"bound": None},
    "exact-unbounded": {"method": "exact", "bound": None},
    "one-sweep": {"sweeps": 1},
    "weak": {"strength": 0.4},
    "tight": {"bound": 0.05},
}


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2"])
def test_every_setting(architecture, settings, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    found, _ = accumulate(model, batches, ProjectionSettings(**settings))
    oracle.assert_close(found, expected(model, batches, **settings))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2", "opt", "gemma"])
def test_checkpointing_changes_nothing(architecture, use_reentrant, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    plain, _ = accumulate(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    found, _ = accumulate(model, batches)
    for name, grad in plain.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("budget", [1e-7, 3e-6, 2e-5])
def test_a_small_memory_budget_changes_nothing(architecture, budget):
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    found, _ = accumulate(model, batches, memory_budget=budget)
    oracle.assert_close(found, expected(model, batches))


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("kwargs", [{}, {"bias": "all"}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_lora(kwargs, k):
    model = lora(tiny_model("qwen2-biases" if "bias" in kwargs else "llama-untied"), **kwargs)
    batches = make_batches("llama-untied", k)
    found, _ = accumulate(model, batches)
    assert all("lora" in name or kwargs for name in found)
    oracle.assert_close(found, expected(model, batches))


@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2", "gemma"])
def test_bfloat16_autocast_accumulates_in_float32(architecture):
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    found, _ = accumulate(model, batches, autocast=True)
    plain = copy.deepcopy(model)
    plain.zero_grad()
    for ids, mask, weights, advantages in batches:
        with torch.autocast("cpu", torch.bfloat16):
            objective = objectives(plain, ids, mask, weights)
        (objective * advantages).sum().backward()
    reinforce = expected(model, batches, method="none")
    proma = expected(model, batches)
    for name, param in plain.named_parameters():
        assert found[name].dtype == torch.float32
        norm = proma[name].norm()
        if norm > 1e-6:
            # No further from the definition than ordinary autocast training is from its own
            rounding = (param.grad.double() - reinforce[name]).norm() / reinforce[name].norm()
            assert (found[name].double() - proma[name]).norm() <= max(2 * rounding, 0.02) * norm, name


def test_bfloat16_weights():
    model, batches = tiny_model("qwen3-tied", dtype=torch.bfloat16), make_batches("qwen3-tied", 4)
    found, _ = accumulate(model, batches)
    want = expected(model, batches)
    for name, grad in found.items():
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - want[name]).norm() <= 0.05 * want[name].norm(), name


@pytest.mark.parametrize("architecture", ["qwen3-tied", "opt"])
def test_padding_contributes_nothing(architecture):
    """Other tokens under the mask of completions change no gradient; nor does a wholly masked sequence."""
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    found, _ = accumulate(model, batches)
    changed = []
    for ids, mask, weights, advantages in batches:
        scored = torch.cat([torch.zeros(len(ids), 1), weights], 1).cumsum(1)
        after = (mask == 0) & (scored > 0)
        changed.append((torch.where(after, 5, ids), mask, weights, advantages))
    assert any((a[0] != b[0]).any() for a, b in zip(batches, changed, strict=True))
    again, _ = accumulate(model, changed)
    for name, grad in found.items():
        assert (again[name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-6), name


def test_an_all_masked_microbatch_changes_nothing():
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    found, _ = accumulate(model, batches[:2])
    ids, mask, weights, advantages = batches[2]
    again, _ = accumulate(model, [*batches[:2], (ids, mask, 0 * weights, advantages)])
    for name, grad in found.items():
        assert torch.equal(again[name], grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen2-biases"])
def test_a_sequence_of_rounding_noise_is_skipped(architecture, method, dtype):
    """A repeated token has no gradient in queries and keys, but for rounding, whose direction is random."""
    model = tiny_model(architecture, dtype=dtype)
    batches = [make_batch(4, seed) for seed in range(3)]
    for ids, mask, _, _ in batches[1:]:
        ids[1] = 5 * mask[1]
    found, _ = accumulate(model, batches, ProjectionSettings(method=method))
    oracle.assert_close(found, expected(model, batches, method=method))


def test_a_shorter_last_microbatch():
    model = tiny_model("qwen3-tied")
    batches = [make_batch(4, 0), make_batch(4, 1), make_batch(3, 2), make_batch(1, 3)]
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_scaled_losses_scale_the_gradient():
    """As Accelerate's division by the number of microbatches, or a gradient scaler, does."""
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    scaled, _ = accumulate(model, batches, scale=256)
    for name in found:
        assert (scaled[name] / 256 - found[name]).norm() <= 1e-5 * found[name].norm(), name


def test_a_sum_of_objectives_is_enough():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    model.zero_grad()
    for ids, mask, weights, advantages in batches:
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        loss = accumulation.loss(objective.sum(), advantages, value=(objective * advantages).sum())
        assert loss.item() == pytest.approx((objective * advantages).sum().item())
        loss.backward()
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, found[name]), name


def test_accelerate_loop():
    """The README's loop: `accelerator.accumulate` and `accelerator.backward`, gradients at the optimizer's step."""
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    want = expected(model, batches)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(batches))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for ids, mask, weights, advantages in batches:
        with accelerator.accumulate(model):
            with accumulation.capture():
                objective = objectives(model, ids, mask, weights)
            accelerator.backward(accumulation.loss(objective, advantages))
            optimizer.step()
            optimizer.zero_grad()
    for name, param in model.named_parameters():
        step = (before[name] - param.detach()).double() / 0.1 * len(batches)
        assert (step - want[name]).norm() <= 1e-3 * want[name].norm(), name


def test_metrics_say_what_was_removed():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    first = expected(model, batches[:1])
    both = expected(model, batches[:2])
    policy = expected(model, batches[1:2])
    _, metrics = accumulate(model, batches[:2])
    removed = sum((first[n] + policy[n] - both[n]).norm() ** 2 for n in first) ** 0.5
    norm = sum(first[n].norm() ** 2 for n in first) ** 0.5
    bounded = [(first[n] + policy[n] - both[n]).norm() / policy[n].norm() > 0.5 - 1e-6 for n in first]
    assert metrics["projection/norm_ratio"] == pytest.approx(float(removed / norm), rel=1e-4)
    assert metrics["projection/bounded_fraction"] == pytest.approx(sum(bounded) / len(bounded))
    assert 0 < metrics["projection/overlap"] < 1
    assert accumulate(model, batches[:1])[1] == {}
