"""Intra-PROMA in the trainer, against its float64 definition: TRL's losses, its fused head, resuming, refusals."""

import math
import re
import warnings

import pytest
import torch
from support import intra, oracle
from support.harness import (
    LORA,
    batch_objectives,
    definition,
    inputs_for,
    make_args,
    make_inputs,
    make_model,
    make_trainer,
    trainer_gradients,
    unscored,
)

from proma_trl import ProjectedAccumulation, PROMAConfig
from proma_trl.intra import IntraPROMA

DIM = 3


def check(trainer, microbatches, head="lm_head.weight", tolerance=1e-5, **settings):
    """The gradient for the optimizer is the definition's, and the reported loss is REINFORCE's."""
    found, losses = trainer_gradients(trainer, microbatches)
    model, _ = definition(trainer, microbatches)
    args, count = trainer.args, len(microbatches)
    batches = [batch_objectives(trainer, inputs, count) for inputs in microbatches]
    want = intra.accumulate(
        model,
        batches,
        dim=args.intra_dim,
        iterations=args.intra_power_iterations,
        strength=args.intra_strength,
        target=args.intra_target,
        seed=args.seed,
        fused_head=head,
        method=args.projection,
        **settings,
    )
    oracle.assert_close(found, want, tolerance)
    model = model.double()
    for loss, (objectives, advantages, _) in zip(losses, batches, strict=True):
        assert loss == pytest.approx(float((objectives(model) * advantages).sum()), rel=1e-4, abs=1e-6)


HEADS = {"qwen3-tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "qwen2-biases", "gpt2", "gemma2-softcap"])
def test_every_architecture(architecture, k, projection, tmp_path):
    head = HEADS.get(architecture, "lm_head.weight" if "llama" in architecture else "model.embed_tokens.weight")
    trainer = make_trainer(
        tmp_path,
        make_model(architecture),
        intra_dim=DIM,
        projection=projection,
        per_device_train_batch_size=k,
        gradient_accumulation_steps=8 // k if k < 8 else 2,
    )
    check(trainer, inputs_for(architecture, k), head)


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("budget", [1e-7, 2e-5])
@pytest.mark.parametrize("dim", [DIM, 10])
def test_vocabularies_in_ranges(dim, budget, projection, tmp_path, monkeypatch):
    """The logits' gradients are made again, a few rows of the vocabulary at a time."""
    monkeypatch.setattr("proma_trl.trainer.fused_head._TILE_ELEMENTS", 512)
    trainer = make_trainer(tmp_path, intra_dim=dim, projection=projection, projection_memory_budget=budget)
    check(trainer, [make_inputs(4, seed) for seed in range(3)], HEADS["qwen3-tied"])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_and_ratios(loss_type, level, tmp_path):
    trainer = make_trainer(
        tmp_path, intra_dim=DIM, projection="none", loss_type=loss_type, importance_sampling_level=level
    )
    microbatches = [make_inputs(4, seed, off_policy=True) for seed in range(3)]
    check(trainer, microbatches, HEADS["qwen3-tied"])


@pytest.mark.parametrize("projection", ["none", "iterative"])
def test_other_settings(projection, tmp_path):
    settings = {"intra_power_iterations": 2, "intra_strength": 0.6, "intra_target": "accumulated", "seed": 7}
    trainer = make_trainer(tmp_path, intra_dim=DIM, projection=projection, **settings)
    check(trainer, [make_inputs(4, seed) for seed in range(3)], HEADS["qwen3-tied"])


@pytest.mark.parametrize("projection", ["none", "iterative"])
def test_without_the_head(projection, tmp_path):
    trainer = make_trainer(tmp_path, intra_dim=DIM, projection=projection, intra_head=False)
    check(trainer, [make_inputs(4, seed) for seed in range(3)], skipped=[HEADS["qwen3-tied"]])


@pytest.mark.parametrize("projection", ["none", "iterative"])
def test_lora(projection, tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LORA, intra_dim=DIM, projection=projection)
    check(trainer, [make_inputs(4, seed) for seed in range(3)])


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("budget", [1e-7, 0.5])
def test_bfloat16(budget, projection, tmp_path):
    """Mixed precision, as on a GPU: no further from the definition than REINFORCE is from its own, or 5%."""
    microbatches = [make_inputs(4, seed) for seed in range(3)]
    errors = []
    for dim, method in ((0, "none"), (DIM, projection)):
        settings = {"intra_dim": dim, "projection": method, "projection_memory_budget": budget}
        trainer = make_trainer(tmp_path, bf16=True, **settings)
        found, _ = trainer_gradients(trainer, microbatches)
        model, _ = definition(trainer, microbatches)
        batches = [batch_objectives(trainer, inputs, len(microbatches)) for inputs in microbatches]
        want = intra.accumulate(
            model,
            batches,
            dim=dim or 1,
            strength=float(dim > 0),
            fused_head=HEADS["qwen3-tied"],
            seed=42,
            method=method,
        )
        errors.append(
            {name: float((found[name] - w).norm() / w.norm()) for name, w in want.items() if w.norm() > 1e-6}
        )
        assert all(grad.dtype == torch.float32 for grad in found.values())
    for name, error in errors[1].items():
        assert error <= max(4 * errors[0][name], 0.05), name


@pytest.mark.parametrize(
    ("k", "which", "budget", "projection"),
    [
        (1, 0, 0.5, "none"),
        (1, 1, 1e-7, "iterative"),
        (4, 0, 1e-7, "iterative"),
        (4, 1, 0.5, "iterative"),
        (4, 1, 1e-7, "none"),
        (4, 2, 0.5, "none"),
        (4, "first row", 1e-7, "none"),
        (4, "last row", 0.5, "iterative"),
    ],
)
def test_nothing_scored(k, which, budget, projection, tmp_path):
    """Such a microbatch adds nothing, and its tokens span no directions."""
    settings = {"intra_dim": DIM, "projection": projection, "projection_memory_budget": budget}
    trainer = make_trainer(tmp_path, per_device_train_batch_size=k, gradient_accumulation_steps=8 // k, **settings)
    check(trainer, unscored([make_inputs(k, seed) for seed in range(3)], which), HEADS["qwen3-tied"])


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama-untied", {"intra_target": "accumulated"}),
        ("llama-untied", {"intra_target": "accumulated", "projection": "none"}),
        ("llama-untied", {"intra_power_iterations": 0}),
        ("llama-untied", {"intra_power_iterations": 2, "projection": "none"}),
        ("llama-untied", {"projection": "exact", "intra_head": False}),
        ("llama-untied", {"projection": "none", "peft_config": LORA}),
        ("gptj", {}),
        ("qwen3-moe", {"projection": "none"}),
    ],
)
def test_nothing_scored_with_other_settings_and_heads(architecture, settings, tmp_path):
    trainer = make_trainer(tmp_path, make_model(architecture), intra_dim=DIM, **settings)
    skipped = ["lm_head.weight"] if settings.get("intra_head") is False else []
    head = HEADS.get(architecture, "lm_head.weight")
    check(trainer, unscored(inputs_for(architecture, 4), 1), head, skipped=skipped)


def test_checkpointing_changes_nothing(tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, intra_dim=DIM, projection="none", gradient_checkpointing=checkpointing)
        gradients, _ = trainer_gradients(trainer, [make_inputs(4, seed) for seed in range(2)])
        found.append({name: grad.clone() for name, grad in gradients.items()})
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("projection", ["none", "iterative"])
def test_a_resumed_run_is_bit_identical(projection, tmp_path):
    settings = {"intra_dim": DIM, "projection": projection, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(p, weights(resumed)[name]) for name, p in weights(whole).items())
    # Random numbers are those of the step: others would have led elsewhere
    (tmp_path / "whole" / "checkpoint-2" / "update_rule.pt").unlink()
    other = make_trainer(tmp_path / "other", **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert not all(torch.equal(p, weights(other)[name]) for name, p in weights(whole).items())


def test_sampling_and_data_are_left_alone(tmp_path):
    """Its random numbers are its own: a run that removes next to nothing samples what REINFORCE samples."""
    seen = []
    for settings in ({}, {"intra_dim": DIM, "intra_strength": 1e-30}):
        completions = []

        def reward(completions, seen=completions, **kwargs):
            seen += completions
            return [float(len(c)) for c in completions]

        make_trainer(tmp_path, projection="none", max_steps=3, reward_funcs=reward, **settings).train()
        seen.append(completions)
    assert seen[0] == seen[1] and seen[0]


def test_what_a_run_says_of_itself(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = make_trainer(tmp_path, intra_dim=DIM, projection="none", max_steps=2)
        trainer.train()
    assert caplog.text.count("Intra-PROMA projects the gradients of 15 weights of linear layers") == 1
    assert "The other parameters keep their gradients: `model.layers.0.self_attn.q_norm.weight`" in caplog.text
    record = trainer.state.log_history[0]
    for name in ("intra/norm_ratio", "intra/captured_inputs", "intra/captured_grads"):
        assert 0 < record[name] < 1, name
    assert "projection/norm_ratio" not in record
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "trained with Intra-PROMA" in card and "2601.10498" in card and "- intra-proma" in card
    assert "| `intra_dim` | `3` |" in card and "projection_bound" not in card
    both = make_trainer(tmp_path, intra_dim=DIM)
    assert both._name == "Intra-PROMA and PROMA" and both._card_papers == ()
    assert make_trainer(tmp_path, intra_dim=DIM, gradient_accumulation_steps=1)._name == "Intra-PROMA"


REFUSED = {
    "intra_dim": [-1, 1.5, "10", None, True],
    "intra_power_iterations": [-1, 0.5, "1", None, False],
    "intra_strength": [-0.1, 1.1, None, "1", True, math.nan],
    "intra_target": ["both", None, 1],
    "intra_head": ["yes", None, 1],
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_of_the_wrong_kind_or_out_of_range_are_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be ")):
        make_args(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be ")):
        ProjectedAccumulation(torch.nn.Linear(2, 2), microbatch_size=1, **{name: value})
    own = name.removeprefix("intra_")
    with pytest.raises(ValueError, match=re.escape(f"`{own}` must be ")):
        IntraPROMA(**{own: value})


@pytest.mark.parametrize("kwargs", [{}, {"projection": "none", "intra_target": "accumulated"}])
def test_a_global_scope_is_refused(kwargs, tmp_path):
    with pytest.raises(ValueError, match=r"`intra_dim=3`.*Set `projection_scope=\"local\"`"):
        make_args(tmp_path, intra_dim=DIM, projection_scope="global", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "without_effect"),
    [
        ({"intra_dim": 3}, []),
        ({"intra_dim": 3, "projection": "none", "projection_memory_budget": 0.1}, []),
        ({"intra_dim": 3, "projection": "none", "projection_scope": "global"}, ["`projection_scope='global'`"]),
        ({"intra_dim": 3, "projection": "none", "gradient_accumulation_steps": 1}, []),
        ({"intra_dim": 3, "gradient_accumulation_steps": 1}, ["this run is Intra-PROMA."]),
        ({"intra_strength": 0.5, "intra_head": False}, ["`intra_strength=0.5`", "`intra_head=False`"]),
        ({"intra_dim": 3, "intra_strength": 0}, ["`intra_dim=3` has no effect with `intra_strength=0.0`"]),
        (
            {"intra_dim": 3, "projection": "none", "intra_target": "accumulated", "gradient_accumulation_steps": 1},
            ['`intra_target="accumulated"` has no effect'],
        ),
    ],
)
def test_settings_without_effect(kwargs, without_effect, tmp_path):
    messages = make_args(tmp_path, **kwargs).settings_without_effect()
    assert len(messages) == len(without_effect), messages
    for message, text in zip(messages, without_effect, strict=True):
        assert text in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, **kwargs)
    said = [str(w.message) for w in caught]
    assert all(message in said for message in messages)


def test_the_default_is_off():
    args = PROMAConfig("unused", use_cpu=True, bf16=False)
    assert args.intra_dim == 0 and not args.intra_settings().removes
