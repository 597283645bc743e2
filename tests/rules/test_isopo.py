"""ISOPO against its float64 definition: all layer kinds, its running means, alone and before PROMA."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from support import oracle
from support.harness import LORA, definition, make_args, make_inputs, make_model, make_trainer, trainer_gradients
from support.models import ARCHITECTURES, tiny_model
from support.sequences import expected, make_batch, run

from proma_trl import PROMA, Chain, InnerProducts, ProjectedAccumulation, PROMAConfig
from proma_trl.rules.isopo import ISOPO

METHODS = ["natural", "norm", "fisher"]


def steps(model, rule, k, scale=1, settings=None, regularization=1.0, method="natural", count=2, left_padding=True):
    """Gradients of two optimizer steps of two microbatches, and what the definition says of them."""
    accumulation = ProjectedAccumulation(model, rule, microbatch_size=k)
    isopo = oracle.Isopo(method, regularization)
    for step in range(count):
        batches = [make_batch(k, 10 * step + i, left_padding) for i in range(2)]
        run(accumulation, batches, scale=scale)
        accumulation.end_step()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        wanted = expected(model, batches, weigh=isopo, **(settings or {"method": "none"}))
        isopo.end_step()
        yield found, wanted
        model.zero_grad()
        with torch.no_grad():  # so that the second step's lengths differ from the running means
            for param in model.parameters():
                param.mul_(1.1)
    accumulation.detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2"])
def test_running_means(architecture, k, method):
    for found, wanted in steps(tiny_model(architecture), ISOPO(method, 0.5), k, method=method, regularization=0.5):
        oracle.assert_close(found, wanted)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("qwen3-tied", "gpt2")])
def test_every_architecture(architecture):
    method = METHODS[sorted(ARCHITECTURES).index(architecture) % 3]
    model, pads_left = tiny_model(architecture), architecture != "gemma2-softcap"
    for found, wanted in steps(model, ISOPO(method), 4, method=method, count=1, left_padding=pads_left):
        oracle.assert_close(found, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projection", ["iterative", "exact"])
def test_before_the_projection(projection, method):
    """The projection's bound is relative to ISOPO's gradient."""
    rule = Chain(ISOPO(method), PROMA(projection))
    for found, wanted in steps(tiny_model("qwen3-tied"), rule, 4, method=method, settings={"method": projection}):
        oracle.assert_close(found, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_without_a_gradient_yet(method):
    """LoRA begins with B = 0, where A has no gradient: a mean of nothing is no mean."""
    model = tiny_model("llama-untied")
    config = copy.deepcopy(LORA)
    config.init_lora_weights = True
    model = get_peft_model(model, config)
    accumulation = ProjectedAccumulation(model, ISOPO(method), microbatch_size=4)
    isopo = oracle.Isopo(method)
    for step in range(2):
        batches = [make_batch(4, seed=10 * step + i) for i in range(2)]
        run(accumulation, batches)
        accumulation.end_step()
        wanted = expected(model, batches, weigh=isopo, method="none")
        isopo.end_step()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        oracle.assert_close(found, wanted)
        zero = [name for name, grad in found.items() if not grad.any()]
        assert bool(zero) == (step == 0)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.sub_(param.grad)


def test_scaled_losses_scale_the_gradient_and_nothing_else():
    plain, scaled = (ISOPO("natural") for _ in range(2))
    pairs = zip(
        steps(tiny_model("gpt2"), plain, 4),
        steps(tiny_model("gpt2"), scaled, 4, scale=2**10),
        strict=True,
    )
    for (found, _), (large, wanted) in pairs:
        oracle.assert_close({name: grad / 2**10 for name, grad in large.items()}, wanted)
        oracle.assert_close(large, {name: grad * 2**10 for name, grad in found.items()})
    means, others = plain.state_dict()["means"], scaled.state_dict()["means"]
    assert means.keys() == others.keys()
    assert all(others[name] == pytest.approx(mean, rel=1e-4) for name, mean in means.items() if mean > 1e-12)


def products_of(sequences, **kwargs):
    return InnerProducts((sequences @ sequences.mT)[None], names=["w"], **kwargs)


SEQUENCES = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_metrics(method):
    rule, products = ISOPO(method, 0.7), products_of(SEQUENCES)
    metrics = rule.observe(products, ADVANTAGES)
    gram = products.gram[0]
    lengths = gram.square().sum(-1) / gram.trace() if method == "fisher" else gram.diagonal()
    ridge = 0.7 * lengths.mean()
    values = torch.linalg.eigvalsh(gram) if method == "natural" else lengths
    assert metrics["isopo/below_regularization"] == pytest.approx(float((values < ridge).double().mean()))
    assert 0 < metrics["isopo/below_regularization"] < 1 or method == "norm"
    coefficients = oracle.Isopo(method, 0.7)("w", list(SEQUENCES), ADVANTAGES)
    ratio = float(coefficients.norm() / ADVANTAGES.norm())
    assert metrics["isopo/coefficient_ratio"] == pytest.approx(ratio)
    # Sequences that fill up a smaller microbatch of another rank change nothing
    padded = torch.cat([SEQUENCES, torch.zeros(2, 30, dtype=torch.float64)])
    filled_up = ISOPO(method, 0.7)
    more = filled_up.observe(products_of(padded, num_sequences=4), torch.cat([ADVANTAGES, torch.zeros(2).double()]))
    assert {n: float(v) for n, v in more.items()} == pytest.approx({n: float(v) for n, v in metrics.items()})
    for one in (rule, filled_up):
        one.end_step(["w"], lambda mean: mean)
    assert rule.state_dict()["means"]["w"] == pytest.approx(filled_up.state_dict()["means"]["w"])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_finite_leave_the_means_alone(method):
    rule = ISOPO(method)
    rule.observe(products_of(SEQUENCES), ADVANTAGES)
    rule.end_step(["w", "other"], lambda mean: mean)
    before = rule.state_dict()
    assert before["means"]["other"] == 0
    if method != "natural":  # eigenvalues of infinity are an error
        rule.observe(products_of(SEQUENCES * math.inf), ADVANTAGES)
        rule.end_step(["w", "other"], lambda mean: mean)
    assert rule.state_dict() == before


def test_large_regularization_is_reinforce():
    for method in METHODS:
        found = ISOPO(method, 1e9).coefficients(products_of(SEQUENCES), ADVANTAGES)
        torch.testing.assert_close(found[0], ADVANTAGES, rtol=1e-6, atol=1e-8)


def test_the_state_is_loaded():
    rule, other = ISOPO(), ISOPO()
    rule.observe(products_of(SEQUENCES), ADVANTAGES)
    rule.end_step(["w"], lambda mean: mean)
    other.load_state_dict(rule.state_dict())
    later = products_of(2 * SEQUENCES)
    assert torch.equal(other.coefficients(later, ADVANTAGES), rule.coefficients(later, ADVANTAGES))
    assert not torch.equal(ISOPO().coefficients(later, ADVANTAGES), rule.coefficients(later, ADVANTAGES))
    with pytest.raises(ValueError, match="not the state of ISOPO"):
        other.load_state_dict({"momentum": 1})


@pytest.mark.parametrize(
    "kwargs,name",
    [
        ({"method": "none"}, "method"),
        ({"regularization": 0}, "regularization"),
        ({"regularization": math.inf}, "regularization"),
    ],
)
def test_settings_out_of_range_are_refused(kwargs, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        ISOPO(**kwargs)
    field = {"method": "isopo", "regularization": "isopo_regularization"}[name]
    with pytest.raises(ValueError, match=f"`{field}`"):
        PROMAConfig("unused", **{field: "sqrt" if name == "method" else kwargs[name]})


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("method", METHODS)
def test_in_a_trainer(method, projection, tmp_path):
    trainer = make_trainer(tmp_path, isopo=method, isopo_regularization=0.5, projection=projection)
    microbatches = [make_inputs(4, seed) for seed in range(3)]
    found, _ = trainer_gradients(trainer, microbatches)
    model, sequences = definition(trainer, microbatches)
    weigh = oracle.Isopo(method, 0.5)
    oracle.assert_close(found, oracle.accumulate(model, sequences, weigh=weigh, method=projection))


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_resumed_run_is_bit_identical(tmp_path):
    """Running means included."""
    settings = {"isopo": "natural", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    saved = torch.load(tmp_path / "whole" / "checkpoint-2" / "update_rule.pt", weights_only=True)
    assert saved["rule"] == "ISOPO and PROMA" and len(saved["state"]["0"]["means"]) == len(weights(whole))
    for keeps in (True, False):
        if not keeps:
            (tmp_path / "whole" / "checkpoint-2" / "update_rule.pt").unlink()
        resumed = make_trainer(tmp_path / f"resumed_{keeps}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        same = [torch.equal(p, weights(resumed)[name]) for name, p in weights(whole).items()]
        assert all(same) == keeps


def test_a_checkpoint_of_another_rule(tmp_path, caplog):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, isopo="norm", projection="none", **settings).train()
    trainer = make_trainer(tmp_path, isopo="norm", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "holds the state of ISOPO: ISOPO and PROMA starts without one" in caplog.text
    assert trainer.state.global_step == 2


def test_what_a_run_says_of_itself(tmp_path):
    trainer = make_trainer(tmp_path, isopo="fisher", max_steps=2)
    trainer.train()
    record = trainer.state.log_history[0]
    assert 0 < record["isopo/coefficient_ratio"] < 1 and 0 <= record["isopo/below_regularization"] <= 1
    assert record["projection/norm_ratio"] > 0
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "trained with ISOPO and PROMA" in card
    for text in ("2512.23353", "abrahamsen2026proma", "| `isopo` | `'fisher'` |", "- isopo", "- proma"):
        assert text in card, text
    alone = make_trainer(tmp_path, make_model(), isopo="fisher", gradient_accumulation_steps=1)
    assert alone._name == "ISOPO"


@pytest.mark.parametrize(
    "kwargs,without_effect",
    [
        ({"isopo": "natural"}, []),
        ({"isopo": "natural", "projection": "none", "projection_memory_budget": 0.1}, []),
        ({"isopo": "natural", "projection": "none", "projection_bound": 1.0}, ["projection_bound=1.0"]),
        ({"isopo_regularization": 2.0}, ["isopo_regularization=2.0"]),
        ({"isopo": "norm", "gradient_accumulation_steps": 1}, ["this run is ISOPO"]),
        ({"isopo": "norm", "gradient_accumulation_steps": 1, "projection": "none"}, []),
    ],
)
def test_settings_without_effect(kwargs, without_effect, tmp_path):
    messages = make_args(tmp_path, **kwargs).settings_without_effect()
    assert len(messages) == len(without_effect)
    for message, text in zip(messages, without_effect, strict=True):
        assert text in message
