"""
What runs only on a GPU: on a CUDA device, and on a CPU that passes for one. TRL's kernels for the fused head are
tested in test_triton.py.
"""

from contextlib import nullcontext

import pytest
import torch
from support import dppo, intra, oracle
from support.accelerator import Waits, accelerating, no_waiting
from support.harness import (
    LORA,
    batch_objectives,
    definition,
    make_inputs,
    make_model,
    make_trainer,
    trainer_gradients,
)

from proma_trl.accumulation.microbatch import Microbatch

HAS_CUDA = torch.cuda.is_available()
ON_CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")])


@pytest.fixture(params=[ON_CUDA, "cpu"])
def device(request):
    with nullcontext() if request.param == "cuda" else accelerating():
        torch.backends.cuda.matmul.allow_tf32 = False
        yield request.param


def trainer_on(device, tmp_path, model=None, **settings):
    return make_trainer(tmp_path, model, use_cpu=device == "cpu", **settings)


def inputs_on(device, k, count=3, first=0):
    seeds = range(first, first + count)
    return [{name: x.to(device) for name, x in make_inputs(k, seed).items()} for seed in seeds]


def gradients(trainer, microbatches):
    found, _ = trainer_gradients(trainer, microbatches)
    return {name: grad.cpu() for name, grad in found.items()}


def defined(trainer, microbatches):
    """What the definition needs, on the CPU."""
    trainer.model.cpu()
    return definition(trainer, [{name: x.cpu() for name, x in inputs.items()} for inputs in microbatches])


def check(trainer, microbatches, **settings):
    found = gradients(trainer, microbatches)
    oracle.assert_close(found, oracle.accumulate(*defined(trainer, microbatches), **settings))


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("budget", [None, 1e-5])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "gpt2", "gemma", "cohere", "gptj"])
def test_float32(architecture, budget, k, device, tmp_path):
    settings = {"per_device_train_batch_size": k, "generation_batch_size": 8, "projection_memory_budget": budget}
    check(trainer_on(device, tmp_path, make_model(architecture), **settings), inputs_on(device, k))


@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_mixtures(architecture, device, tmp_path):
    trainer = trainer_on(device, tmp_path, make_model(architecture), router_aux_loss_coef=0.0)
    check(trainer, inputs_on(device, 4))


def test_the_budget_is_an_eighth_of_the_memory(device, tmp_path):
    trainer = trainer_on(device, tmp_path)
    gradients(trainer, inputs_on(device, 4))
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 2**34
    assert trainer.accumulation.memory_budget == memory / 8 / 2**30


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("budget", [None, 1e-5])
def test_intra(budget, projection, device, tmp_path):
    """Its random numbers are the same on all devices."""
    settings = {"intra_dim": 3, "projection": projection, "projection_memory_budget": budget}
    trainer = trainer_on(device, tmp_path, **settings)
    microbatches = inputs_on(device, 4)
    found = gradients(trainer, microbatches)
    model, _ = defined(trainer, microbatches)
    batches = [batch_objectives(trainer, {n: x.cpu() for n, x in m.items()}, len(microbatches)) for m in microbatches]
    head, seed = "model.embed_tokens.weight", trainer.args.seed
    want = intra.accumulate(model, batches, dim=3, seed=seed, fused_head=head, method=projection)
    oracle.assert_close(found, want)


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("kind,threshold", [("binary_kl", 0.005), ("topk_tv", 0.05)])
def test_trust_region(kind, threshold, projection, device, tmp_path):
    """The most probable tokens stay on the CPU until they are needed."""
    settings = {"divergence": kind, "divergence_threshold": threshold, "projection": projection}
    trainer = trainer_on(device, tmp_path, **settings)
    microbatches = dppo.stale_inputs("qwen3-tied", 4, 20 if kind == "topk_tv" else 0)
    moved = [{name: x if "top" in name else x.to(device) for name, x in inputs.items()} for inputs in microbatches]
    found = gradients(trainer, moved)
    model, _ = defined(trainer, microbatches)
    for inputs in microbatches:
        inputs["weights"] = dppo.token_weights(trainer.args, model.double(), inputs)
    assert any((inputs["weights"] == 0).any() for inputs in microbatches)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches), method=projection))


@pytest.mark.parametrize("budget", [None, 1e-5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "gpt2"])
def test_bfloat16_autocast(architecture, method, checkpointing, budget, device, tmp_path):
    """Sequence gradients are held in bfloat16."""
    settings = {"bf16": True, "projection": method, "projection_memory_budget": budget}
    trainer = trainer_on(device, tmp_path, make_model(architecture), gradient_checkpointing=checkpointing, **settings)
    microbatches = inputs_on(device, 4)
    found = gradients(trainer, microbatches)
    for name, want in oracle.accumulate(*defined(trainer, microbatches), method=method).items():
        assert found[name].dtype == torch.float32
        assert (found[name].double() - want).norm() <= 0.05 * want.norm(), name


@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "gpt2"])
def test_bfloat16_is_no_further_off_than_an_ordinary_step(architecture, device, tmp_path):
    """
    Errors against float64, of all tensors and of three steps together, as the rounding of one step differs from CPU to
    CPU: those of PROMA with sequence gradients in bfloat16, and of REINFORCE, which is an ordinary step.
    """
    errors = {}
    for name, settings in {"held": {}, "ordinary": {"projection": "none"}}.items():
        relative = []
        for step in range(3):
            microbatches = inputs_on(device, 8, 6, first=6 * step)
            model = make_model(architecture)
            trainer = trainer_on(device, tmp_path, model, bf16=True, per_device_train_batch_size=8, **settings)
            found = gradients(trainer, microbatches)
            method = settings.get("projection", "iterative")
            want = oracle.accumulate(*defined(trainer, microbatches), method=method)
            off = sum((found[name].double() - want[name]).square().sum() for name in want)
            relative.append(off / sum(want[name].square().sum() for name in want))
        errors[name] = torch.stack(relative).mean().sqrt()
    assert errors["held"] <= 1.2 * errors["ordinary"], errors


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": True, "intra_dim": 3}])
def test_bfloat16_against_float32_sums(settings, tmp_path):
    """The same forward pass, with sequence gradients held in float32: rounding makes all the difference."""
    microbatches, found = inputs_on("cpu", 4), []
    for context in (nullcontext(), accelerating()):
        with context:
            found.append(gradients(make_trainer(tmp_path, make_model("qwen3-tied"), **settings), microbatches))
    without, held = found
    off = {name: float((held[name] - want).norm() / want.norm()) for name, want in without.items()}
    assert max(off.values()) <= 2**-6, off
    assert max(off.values()) > 1e-4, "nothing was rounded"


SETTINGS = {
    "accumulation": {},
    "exact": {"projection": "exact"},
    "both": {"intra_dim": 3},
    "intra": {"intra_dim": 3, "projection": "none"},
    "budget": {"projection_memory_budget": 1e-5},
    "bfloat16": {"bf16": True, "intra_dim": 3, "gradient_checkpointing": True},
    "lora": {"bf16": True, "peft_config": LORA},
}


@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_backward_pass_does_not_wait_for_the_device(settings, architecture, device, tmp_path):
    trainer = trainer_on(device, tmp_path, make_model(architecture), **settings)
    microbatches = inputs_on(device, 4)
    trainer_gradients(trainer, microbatches)  # warm up
    for inputs in microbatches[:2]:  # nothing has been accumulated before the first
        loss = trainer.compute_loss(trainer.model, inputs)
        if device == "cpu":
            with no_waiting():
                loss.backward()
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(torch.ones_like(x).long()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_noticed(wait):
    with no_waiting(), pytest.raises(Waits):
        wait(torch.arange(3.0))


@pytest.mark.parametrize("empty", ["some", "all"])
@pytest.mark.parametrize("budget", [None, 1e-5, 1e-7])
def test_sequences_without_scored_tokens(budget, empty, device, tmp_path):
    """As truncated completions are without, with `mask_truncated_completions`."""
    microbatches = inputs_on(device, 4)
    masks = [microbatches[1]["completion_mask"]] if empty == "all" else [m["completion_mask"][1] for m in microbatches]
    for mask in masks:
        mask.zero_()
    check(trainer_on(device, tmp_path, projection_memory_budget=budget), microbatches)


def test_padding_costs_the_head_nothing(device, tmp_path, monkeypatch):
    """Positions are those of the completions' tokens."""
    positions = []
    original = Microbatch.head_form
    monkeypatch.setattr(
        Microbatch,
        "head_form",
        lambda sink, param, count, dtype: positions.append(count) or original(sink, param, count, dtype),
    )
    trainer = trainer_on(device, tmp_path)
    microbatches = inputs_on(device, 4)
    gradients(trainer, microbatches)
    wanted = [int(inputs["completion_mask"].sum()) for inputs in microbatches]
    assert positions[-3:] == wanted
    assert all(count < inputs["completion_mask"].numel() for count, inputs in zip(wanted, microbatches, strict=True))
