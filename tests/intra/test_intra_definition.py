"""Intra-PROMA in a plain PyTorch loop, against its float64 definition."""

import copy

import pytest
import torch
from support import intra, oracle
from support.models import ARCHITECTURES, tiny_mixture, tiny_model
from support.sequences import LENGTH, accumulate, lora, make_batch, make_batches, objectives

from proma_trl import PROMA, REINFORCE, Chain
from proma_trl.rules.isopo import ISOPO

DIM = 4


def expected(model, batches, **settings):
    def microbatch(ids, mask, weights, advantages):
        return lambda m: objectives(m, ids, mask, weights), advantages, mask

    return intra.accumulate(model, [microbatch(*batch) for batch in batches], **{"dim": DIM, **settings})


def found(model, batches, rule=None, **kwargs):
    return accumulate(model, batches, rule or REINFORCE(), **{"intra_dim": DIM, **kwargs})


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    gradients, _ = found(model, batches)
    oracle.assert_close(gradients, expected(model, batches))


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "qwen2-biases", "gpt2"])
def test_with_the_accumulation_variant(architecture, method, k):
    """Its bound is relative to what is left of the microbatch's gradient."""
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    gradients, _ = found(model, batches, PROMA(method))
    oracle.assert_close(gradients, expected(model, batches, method=method))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rule", ["reinforce", "proma"])
def test_what_has_been_accumulated(rule, k):
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", k)
    settings = {"method": "none"} if rule == "reinforce" else {"method": "iterative"}
    gradients, _ = found(model, batches, PROMA(**settings), intra_target="accumulated", intra_strength=0.7)
    oracle.assert_close(gradients, expected(model, batches, target="accumulated", strength=0.7, **settings))


def test_after_isopo():
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    for rule, method in ((ISOPO("norm"), "none"), (Chain(ISOPO("norm"), PROMA()), "iterative")):
        gradients, _ = found(model, batches, rule)
        oracle.assert_close(gradients, expected(model, batches, method=method, weigh=oracle.Isopo("norm")))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_mixtures_of_experts(model_type, k, implementation):
    """Each expert is a layer with the tokens that were routed to it. Routers and sinks keep their gradients."""
    model, batches = tiny_mixture(model_type), make_batches("llama-untied", k)
    model.set_experts_implementation(implementation)
    gradients, metrics = found(model, batches)
    want = expected(model, batches)
    oracle.assert_close(gradients, want)
    assert any("experts.gate_up_proj" in name for name in gradients) and metrics["intra/norm_ratio"] > 0
    plain = expected(model, batches, strength=0)
    experts = [name for name in want if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 2 and all((plain[n] - want[n]).norm() > 1e-2 * want[n].norm() for n in experts)
    gradients, _ = found(model, batches, PROMA())
    oracle.assert_close(gradients, expected(model, batches, method="iterative"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_a_mixture(use_reentrant, monkeypatch):
    monkeypatch.setattr("proma_trl.sequence_grads.experts._BATCH_ELEMENTS", 1)  # one expert at a time
    model, batches = tiny_mixture("qwen3_moe"), make_batches("llama-untied", 4)
    want = expected(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    gradients, _ = found(model, batches)
    oracle.assert_close(gradients, want)


SETTINGS = {
    "one-dimension": {"dim": 1},
    "more-than-the-layer-has": {"dim": 40},
    "no-iterations": {"iterations": 0},
    "three-iterations": {"iterations": 3},
    "half": {"strength": 0.5},
    "another-seed": {"seed": 5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("architecture", ["llama-untied", "gpt2"])
def test_every_setting(architecture, settings):
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    names = {"iterations": "intra_power_iterations", "seed": "seed"}
    gradients, _ = found(model, batches, **{names.get(n, f"intra_{n}"): value for n, value in settings.items()})
    want = expected(model, batches, **settings)
    if settings.get("dim") == 40:  # where nearly all is removed, what is left is rounding of what was there
        for name, grad in expected(model, batches, strength=0).items():
            assert (gradients[name] - want[name]).norm() <= 1e-5 * grad.norm(), name
    else:
        oracle.assert_close(gradients, want)
        plain = expected(model, batches)
        assert any((plain[name] - grad).norm() > 1e-2 * grad.norm() for name, grad in want.items())


def test_many_iterations_are_a_singular_value_decomposition():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)[:1]
    gradients, _ = found(model.double(), batches, intra_power_iterations=200, intra_dim=2)
    factors = {}
    want = expected(model, batches, dim=2, factors=factors)
    near = [name for name, factor in factors.items() if factor**200 < 1e-6]
    assert len(near) >= len(factors) / 2
    for name in near:
        assert (gradients[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
def test_checkpointing_changes_nothing(rule, use_reentrant):
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    plain, _ = found(model, batches, rule)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    again, _ = found(model, batches, rule)
    for name, grad in plain.items():
        assert torch.equal(again[name], grad), name


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_lora(kwargs, rule, k):
    """Adapters of rank 4, of which a subspace of dimension 4 is all."""
    for dim in (3, 4):
        model, batches = lora(tiny_model("llama-untied"), **kwargs), make_batches("llama-untied", k)
        gradients, _ = found(model, batches, rule, intra_dim=dim)
        method = "none" if rule.is_plain else "iterative"
        oracle.assert_close(gradients, expected(model, batches, dim=dim, method=method))


@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied"])
def test_the_head_can_be_left_out(architecture, rule):
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    gradients, _ = found(model, batches, rule, intra_head=False)
    head = "model.embed_tokens.weight" if architecture == "qwen3-tied" else "lm_head.weight"
    method = "none" if rule.is_plain else "iterative"
    oracle.assert_close(gradients, expected(model, batches, skipped=[head], method=method))


def widen(batch, left, right):
    """The same sequences in a wider microbatch."""
    ids, mask, weights, advantages = batch
    pad = torch.nn.functional.pad
    return pad(ids, (left, right)), pad(mask, (left, right)), pad(weights, (left, right)), advantages


@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
@pytest.mark.parametrize(("left", "right"), [(7, 0), (0, 9), (20, 13)])
def test_padding_does_not_matter(left, right, rule):
    # Rotary positions are relative: sequences that are moved have the same probabilities, but for rounding in float32,
    # in which transformers rotates
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    model.double()
    plain, _ = found(model, batches, rule)
    wide, _ = found(model, [widen(batch, left, right) for batch in batches], rule)
    for name, grad in plain.items():
        assert (wide[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_zero_advantages():
    """Sequences without an advantage shape the subspaces; if there are no others, nothing is accumulated."""
    model, (batch, *_) = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    ids, mask, weights, advantages = batch
    advantages = torch.tensor([0.0, 1.5, 0.0, 0.0])
    gradients, _ = found(model, [(ids, mask, weights, advantages)])
    want = expected(model, [(ids, mask, weights, advantages)])
    oracle.assert_close(gradients, want)
    alone = expected(model, [tuple(x[1:2] for x in (ids, mask, weights, advantages))])
    assert any((alone[name] - grad).norm() > 1e-2 * grad.norm() for name, grad in want.items())
    gradients, metrics = found(model, [(ids, mask, weights, 0 * advantages)])
    assert all(not grad.any() for grad in gradients.values())
    assert metrics["intra/norm_ratio"] == 0


@pytest.mark.parametrize("k", [1, 2])
def test_few_tokens_and_dead_units(k):
    """Fewer real tokens than dimensions, units that never act, gradients of zero: no direction is made up."""
    model = tiny_model("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight[:20] = 0
            layer.fc1.bias[:20] = -1
            layer.fc2.weight[:, 30:] = 0
    batches = []
    for seed in range(2):
        ids, mask, weights, advantages = make_batch(k, seed)
        mask[:, :4] = 0
        mask[:, 7:] = 0
        weights = weights * 0 + (mask[:, 1:] * mask[:, :-1])
        batches.append((ids, mask, weights, advantages))
    gradients, metrics = found(model, batches, intra_dim=10)
    assert all(grad.isfinite().all() for grad in gradients.values())
    oracle.assert_close(gradients, expected(model, batches, dim=10))
    assert metrics["intra/captured_inputs"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
def test_bfloat16_autocast(rule):
    """No further from the definition, with its own subspaces' rounding, than ordinary autocast training is."""
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    gradients, _ = found(model, batches, rule, autocast=True)
    method = "none" if rule.is_plain else "iterative"
    want = expected(model, batches, method=method)
    plain = copy.deepcopy(model)
    plain.zero_grad()
    for ids, mask, weights, advantages in batches:
        with torch.autocast("cpu", torch.bfloat16):
            objective = objectives(plain, ids, mask, weights)
        (objective * advantages).sum().backward()
    reinforce = expected(model, batches, dim=1, strength=0)
    for name, param in plain.named_parameters():
        norm = want[name].norm()
        if norm > 1e-6:
            rounding = (param.grad.double() - reinforce[name]).norm() / reinforce[name].norm()
            assert gradients[name].dtype == torch.float32
            assert (gradients[name].double() - want[name]).norm() <= max(4 * rounding, 0.05) * norm, name


@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
@pytest.mark.parametrize("target", ["microbatch", "accumulated"])
def test_bfloat16_weights(target, rule):
    model, batches = tiny_model("qwen3-tied", dtype=torch.bfloat16), make_batches("qwen3-tied", 4)
    gradients, _ = found(model, batches, rule, intra_target=target)
    method = "none" if rule.is_plain else "iterative"
    for name, want in expected(model, batches, target=target, method=method).items():
        assert gradients[name].dtype == torch.bfloat16
        assert (gradients[name].double() - want).norm() <= 0.05 * want.norm(), name


def test_metrics():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)[:1]
    gradients, metrics = found(model, batches)
    plain, _ = accumulate(model, batches, REINFORCE())
    names = [name for name, grad in plain.items() if grad.dim() == 2 and "embed" not in name]
    removed = sum((plain[name] - gradients[name]).double().square().sum() for name in names)
    total = sum(plain[name].double().square().sum() for name in names)
    assert metrics["intra/norm_ratio"] == pytest.approx(float((removed / total).sqrt()), rel=1e-4)
    assert 0 < metrics["intra/captured_grads"] < 1 and 0 < metrics["intra/captured_inputs"] < 1
    everything, metrics = found(model, batches, intra_dim=LENGTH * 4 + 60)
    assert metrics["intra/captured_inputs"] == pytest.approx(1, abs=1e-4)
    assert metrics["intra/norm_ratio"] == pytest.approx(1, abs=1e-4)
    assert all(everything[name].norm() <= 1e-4 * plain[name].norm() for name in names)
