"""The trainer's loss and its gradients, against the float64 definition."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from support import oracle
from support.harness import (
    TOKENIZER,
    check,
    definition,
    inputs_for,
    make_model,
    make_trainer,
    token_log_probs,
    trainer_gradients,
    unscored,
)
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer
from proma_trl.accumulation.microbatch import Microbatch

ARCHITECTURES = [
    "qwen3-tied",
    "llama-untied",
    "qwen2-biases",
    "gpt2",
    "gemma",
    "gemma2-softcap",
    "cohere",
    "granite",
    "opt",
    "gptj",
]


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_head_and_layers(architecture, k, tmp_path):
    """Soft-capping (Gemma 2), logit scales (Cohere, Granite), a biased head (GPT-J) and temperature."""
    trainer = make_trainer(
        tmp_path, make_model(architecture), per_device_train_batch_size=k, generation_batch_size=8, temperature=0.7
    )
    check(trainer, inputs_for(architecture, k))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "exact"},
        {"projection": "none"},
        {"projection_bound": None},
        {"projection": "exact", "projection_bound": None, "projection_strength": 0.5},
        {"projection_sweeps": 1},
    ],
    ids=lambda settings: "-".join(f"{k.removeprefix('projection_')}={v}" for k, v in settings.items()),
)
def test_projection_settings(settings, k, checkpointing, tmp_path):
    trainer = make_trainer(
        tmp_path,
        per_device_train_batch_size=k,
        generation_batch_size=8,
        gradient_checkpointing=checkpointing,
        **settings,
    )
    check(trainer, inputs_for("qwen3-tied", k))


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_types_and_ratios(loss_type, level, off_policy, tmp_path):
    """Ratios far from one stay unclipped."""
    trainer = make_trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    microbatches = inputs_for("qwen3-tied", 4, off_policy=off_policy)
    if off_policy:
        model, _ = definition(trainer, microbatches)
        ratios = torch.stack(
            [
                (token_log_probs(model, microbatches[0], i) - microbatches[0]["old_per_token_logps"][i]).exp()
                for i in range(4)
            ]
        )
        assert ratios.max() > 1.5 and ratios.min() < 0.5
    check(trainer, microbatches)


@pytest.mark.parametrize("budget", [1e-7, 1e-5, 3e-5])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "gptj"])
def test_every_form_of_the_head_under_a_memory_budget(architecture, budget, tmp_path, monkeypatch):
    """A budget too small for sequence gradients, or for their factors, or for neither; in ranges of the vocabulary."""
    monkeypatch.setattr("proma_trl.trainer.fused_head._TILE_ELEMENTS", 28 * 17)
    trainer = make_trainer(tmp_path, make_model(architecture), projection_memory_budget=budget)
    check(trainer, inputs_for(architecture, 4))


@pytest.mark.parametrize("architecture", ["llama-untied", "qwen3-tied"])
def test_the_forms_of_the_head_are_all_reached(architecture, tmp_path, monkeypatch):
    forms = set()
    original = Microbatch.head_form
    monkeypatch.setattr(Microbatch, "head_form", lambda *args: forms.add(original(*args)) or original(*args))
    trainer = make_trainer(tmp_path, make_model(architecture))
    for budget in (1e-7, 3e-5, 0.5):
        trainer.accumulation.memory_budget = budget
        check(trainer, inputs_for(architecture, 4))
    assert forms == {"dense", "factors", "recompute"}


@pytest.mark.parametrize("k", [1, 4])
def test_lora(k, tmp_path):
    trainer = make_trainer(
        tmp_path,
        make_model("llama-untied"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0),
        per_device_train_batch_size=k,
        generation_batch_size=4,
    )
    with torch.no_grad():
        for name, param in trainer.model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    assert all("lora" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    check(trainer, inputs_for("llama-untied", k))


@pytest.mark.parametrize("cast", [False, True])
def test_bfloat16_autocast(cast, tmp_path):
    """Accumulated in float32, and no further from the definition than GRPO's gradient is from its own."""
    microbatches = inputs_for("qwen3-tied", 4)
    trainer = make_trainer(tmp_path, bf16=True, cast_lm_head_to_fp32=cast)
    found, _ = trainer_gradients(trainer, microbatches)
    model, objectives = definition(trainer, microbatches)
    want = oracle.accumulate(model, objectives)
    reinforce = oracle.accumulate(model, objectives, method="none")
    grpo = make_trainer(tmp_path, None, GRPOTrainer, GRPOConfig, bf16=True, cast_lm_head_to_fp32=cast, epsilon=1e6)
    plain, _ = trainer_gradients(grpo, microbatches)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        rounding = (plain[name].double() - reinforce[name]).norm() / reinforce[name].norm()
        assert (grad.double() - want[name]).norm() <= max(2 * rounding, 0.02) * want[name].norm(), name


def test_token_masks_are_token_weights(tmp_path):
    """Tool masks and the mask of low-entropy tokens enter the sequences' directions."""
    microbatches = inputs_for("qwen3-tied", 4)
    for inputs in microbatches:
        inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
        inputs["tool_mask"][:, 2:4] = 0
    check(make_trainer(tmp_path), microbatches)

    trainer = make_trainer(tmp_path, top_entropy_quantile=0.5)
    trainer_gradients(trainer, microbatches)  # the first microbatch of a run is also checked
    masks = []
    original = trainer.get_high_entropy_mask
    trainer.get_high_entropy_mask = lambda *args: masks.append(original(*args)) or masks[-1]
    trainer_gradients(trainer, microbatches)
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    for inputs, mask in zip(microbatches, masks, strict=True):
        inputs["weights"] = mask
    check(trainer, microbatches)


def test_off_policy_masks_see_the_true_advantages(tmp_path):
    """Sequences far off the policy are dropped where their advantage is negative, and only there."""
    microbatches = inputs_for("qwen3-tied", 4, off_policy=True)
    trainer = make_trainer(tmp_path, off_policy_mask_threshold=0.0)
    dropped = 0
    for inputs in microbatches:
        inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 3.0
        keep = inputs["advantages"].unsqueeze(1) >= 0
        inputs["weights"] = keep.expand_as(inputs["completion_mask"])
        dropped += (~keep).sum()
    assert dropped > 0
    check(trainer, microbatches)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_none_is_grpo_on_policy(loss_type, tmp_path):
    microbatches = inputs_for("qwen3-tied", 4)
    found, losses = trainer_gradients(make_trainer(tmp_path, projection="none", loss_type=loss_type), microbatches)
    grpo = make_trainer(tmp_path, None, GRPOTrainer, GRPOConfig, loss_type=loss_type)
    want, grpo_losses = trainer_gradients(grpo, microbatches)
    assert losses == pytest.approx(grpo_losses)
    for name in want:
        assert torch.equal(found[name], want[name]), name


def test_a_first_microbatch_alone_is_grpo_on_policy(tmp_path):
    """Through the hooks and the fused head: with nothing accumulated there is nothing to remove."""
    microbatches = inputs_for("qwen3-tied", 4)[:1]
    found, losses = trainer_gradients(make_trainer(tmp_path), microbatches)
    want, grpo_losses = trainer_gradients(make_trainer(tmp_path, None, GRPOTrainer, GRPOConfig), microbatches)
    assert losses == pytest.approx(grpo_losses)
    for name in want:
        assert (found[name] - want[name]).norm() <= 1e-5 * want[name].norm(), name


@pytest.mark.parametrize(
    ("k", "which", "projection"),
    [(1, 1, "iterative"), (4, 0, "iterative"), (4, 1, "iterative"), (4, 1, "exact"), (4, "last row", "iterative")],
)
def test_nothing_scored(k, which, projection, tmp_path):
    """As where `mask_truncated_completions` masks all of a microbatch: it adds nothing, and protects nothing."""
    sizes = {"per_device_train_batch_size": k, "generation_batch_size": 8}
    check(make_trainer(tmp_path, projection=projection, **sizes), unscored(inputs_for("qwen3-tied", k), which))


@pytest.mark.parametrize(
    ("architecture", "budget"),
    [("llama-untied", 1e-5), ("llama-untied", 1e-7), ("gptj", 1e-7), ("qwen3-moe", 0.5), ("lfm2", 0.5)],
)
def test_nothing_scored_with_every_head(architecture, budget, tmp_path):
    trainer = make_trainer(tmp_path, make_model(architecture), projection_memory_budget=budget)
    check(trainer, unscored(inputs_for(architecture, 4), 1))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_nothing_scored_with_every_loss(loss_type, tmp_path):
    """Those that divide by a microbatch's own number of tokens."""
    trainer = make_trainer(tmp_path, loss_type=loss_type, projection="exact")
    check(trainer, unscored(inputs_for("qwen3-tied", 4), 1))


@pytest.mark.parametrize(("isopo", "which"), [("natural", 0), ("norm", 0), ("fisher", 0), ("fisher", "last row")])
def test_nothing_scored_under_isopo(isopo, which, tmp_path):
    trainer = make_trainer(tmp_path, isopo=isopo)
    microbatches = unscored(inputs_for("qwen3-tied", 4), which)
    found, _ = trainer_gradients(trainer, microbatches)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches), weigh=oracle.Isopo(isopo)))


def trained_on_truncated(folder, trainer_class, config, **settings):
    """The log of a step in which no token is scored, and whether it has moved the weights."""
    never = [TOKENIZER.pad_token_id, TOKENIZER.eos_token_id]
    settings |= {"mask_truncated_completions": True, "generation_kwargs": {"suppress_tokens": never}}
    trainer = make_trainer(folder, None, trainer_class, config, weight_decay=0.0, max_completion_length=2, **settings)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    return trainer.state.log_history[0], moved


@pytest.fixture(scope="module")
def grpo_on_truncated(tmp_path_factory):
    return trained_on_truncated(tmp_path_factory.mktemp("grpo"), GRPOTrainer, GRPOConfig)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"projection": "none", "isopo": "natural"},
        {"projection": "none", "intra_dim": 2},
        {"projection": "none", "intra_dim": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"projection": "exact", "intra_dim": 2, "intra_target": "accumulated"},
        {"projection": "none", "divergence": "topk_kl"},
        {"intra_dim": 2, "isopo": "fisher", "divergence": "binary_tv"},
    ],
)
def test_a_step_without_a_scored_token_leaves_the_weights_as_grpo_does(settings, grpo_on_truncated, tmp_path):
    """And no metric is other than a finite number."""
    (theirs, moved), (ours, also_moved) = (
        grpo_on_truncated,
        trained_on_truncated(tmp_path, PROMATrainer, PROMAConfig, **settings),
    )
    assert moved == also_moved == []
    assert theirs["completions/clipped_ratio"] == ours["completions/clipped_ratio"] == 1
    assert theirs["grad_norm"] == ours["grad_norm"] == 0
    json.dumps(ours, allow_nan=False)
