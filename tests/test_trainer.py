"""PROMATrainer against the float64 definition and against GRPOTrainer."""

import copy
import inspect
import json
import re
import shutil
from types import MethodType

import oracle
import pytest
import torch
from datasets import Dataset
from harness import (
    TOKENIZER,
    definition,
    make_args,
    make_inputs,
    make_model,
    make_trainer,
    token_log_probs,
    trainer_gradients,
    vowel_reward,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer
from proma_trl.accumulation.microbatch import Microbatch


def check(trainer, microbatches, tolerance=1e-5):
    """The gradient for the optimizer is the definition's, and the reported loss is REINFORCE's."""
    found, losses = trainer_gradients(trainer, microbatches)
    model, objectives = definition(trainer, microbatches)
    args = trainer.args
    want = oracle.accumulate(
        model,
        objectives,
        method=args.projection,
        sweeps=args.projection_sweeps,
        bound=args.projection_bound,
        strength=args.projection_strength,
    )
    oracle.assert_close(found, want, tolerance)
    model = model.double()
    for loss, (functions, advantages) in zip(losses, objectives, strict=True):
        value = sum(a * f(model).item() for a, f in zip(advantages.tolist(), functions, strict=True))
        assert loss == pytest.approx(value, rel=1e-4, abs=1e-6)


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


def inputs_for(architecture, k, **kwargs):
    # Eager attention in float64 is NaN where transformers masks all of a position's keys
    microbatches = [make_inputs(k, seed, **kwargs) for seed in range(3)]
    if architecture in ("gemma2-softcap", "gptj"):
        for inputs in microbatches:
            inputs["prompt_mask"][:] = 1
    return microbatches


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


class Recorder(TrainerCallback):
    """Keeps what the optimizer gets, and the weights before its step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing": True, "loss_type": "grpo"}])
def test_what_reaches_the_optimizer_in_training(kwargs, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], max_grad_norm=0.0, **kwargs)
    initial = copy.deepcopy(trainer.model.state_dict())
    microbatches = []
    original = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: microbatches.append(dict(inputs)) or original(model, inputs)
    trainer.train()
    trainer.model.load_state_dict(initial)
    assert len(microbatches) == 3 and any((m["advantages"] != 0).any() for m in microbatches)
    model, objectives = definition(trainer, microbatches)
    oracle.assert_close(recorder.gradients, oracle.accumulate(model, objectives))


def test_training_logs_the_projection_and_no_clipping(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    record = trainer.state.log_history[0]
    for name in ("norm_ratio", "bounded_fraction", "overlap"):
        assert 0 <= record[f"projection/{name}"] <= 1
    assert record["projection/norm_ratio"] > 0
    assert "entropy" in record and "reward" in record
    assert not any("clip_ratio" in name for name in record)


def test_several_optimizer_steps_a_generation(tmp_path):
    """Off-policy minibatches carry TRL's log-probabilities at sampling time, and train."""
    trainer = make_trainer(tmp_path, max_steps=4, steps_per_generation=6, num_iterations=2, generation_batch_size=None)
    seen = []
    original = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (
        seen.append("old_per_token_logps" in inputs) or original(model, inputs)
    )
    trainer.train()
    assert len(seen) == 12 and all(seen)
    assert trainer.state.global_step == 4


def test_conversations_reward_functions_and_evaluation(tmp_path):
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("ab", "cd", "e", "f")] * 4})

    def length_reward(completions, log_metric=None, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    def zero_reward(completions, **kwargs):
        return [0.0] * len(completions)

    trainer = PROMATrainer(
        make_model(),
        [length_reward, zero_reward],
        make_args(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, reward_weights=[1, 2]),
        data,
        data.select(range(2)),
        TOKENIZER,
    )
    trainer.train()
    evaluation = next(record for record in trainer.state.log_history if "eval_loss" in record)
    assert "eval_reward" in evaluation and not any("clip_ratio" in name for name in evaluation)
    assert trainer.state.log_history[0]["rewards/length_reward/mean"] > 0


@pytest.mark.parametrize("steps_per_generation", [3, 6])
def test_resuming_ends_with_the_same_weights(steps_per_generation, tmp_path):
    """Also where the checkpoint falls between two optimizer steps on one generation."""
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "steps_per_generation": steps_per_generation,
        "seed": 3,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    if steps_per_generation == 6:
        # Where checkpoints replace each other, files of an earlier one stay.
        shutil.copy(tmp_path / "whole" / "checkpoint-1" / "rollout_0.pt", tmp_path / "whole" / "checkpoint-2")
    for step in (1, 2):
        resumed = make_trainer(tmp_path / f"resumed-{step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 4
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed from step {step}: {name}"


def test_model_card_and_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, projection_bound=None, save_strategy="steps", save_steps=1)
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        trainer.save_model(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(a, b)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "2601.10498" in card and "@article{abrahamsen2026proma" in card
    assert "trained with PROMA" in card
    assert re.search(r"- proma\b", card) and "- trl" in card
    assert "| `projection_bound` | `None` |" in card and "| `projection` | `'iterative'` |" in card


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: TRL's defaults train in bfloat16 on one"
)
def test_defaults_like_grpo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny-model"
    make_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    trainer = PROMATrainer(str(folder), vowel_reward, train_dataset=Dataset.from_dict({"prompt": ["ab"] * 8}))
    assert trainer.args.output_dir.endswith("tiny-model-PROMA") and isinstance(trainer.args, PROMAConfig)


# What the first microbatch shows


def test_trl_methods_keep_their_signatures():
    """Positional calls from TRL, or from code written for it, must not fail."""
    for name, method in vars(PROMATrainer).items():
        original = inspect.getattr_static(GRPOTrainer, name, None)
        if inspect.isfunction(method) and original is not None:
            want = [(p.name, p.kind) for p in inspect.signature(original).parameters.values()]
            assert [(p.name, p.kind) for p in inspect.signature(method).parameters.values()] == want, name
    assert PROMATrainer.get_off_policy_mask is GRPOTrainer.get_off_policy_mask


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("term", ["sign", "square", "gradient"])
def test_a_loss_that_is_not_linear_in_the_advantages_is_refused(term, k, tmp_path, monkeypatch):
    original = GRPOTrainer._compute_loss
    loss = {
        "sign": lambda loss, advantages: loss * (1 + 0.1 * (advantages > 0).float().mean()),
        "square": lambda loss, advantages: loss + 0.01 * advantages.square().sum(),
        # Its value is right, its gradient is not: as with a ratio that is clipped, on-policy
        "gradient": lambda loss, advantages: torch.where(
            (advantages < 0).any(), 1.5 * loss - 0.5 * loss.detach(), loss
        ),
    }[term]
    monkeypatch.setattr(
        GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: loss(original(self, model, inputs), inputs["advantages"]),
    )
    trainer = make_trainer(tmp_path, per_device_train_batch_size=k, generation_batch_size=4)
    with pytest.raises(RuntimeError, match=r"`loss_type='dapo'`\) is not linear in the advantages.*`GRPOTrainer`"):
        trainer_gradients(trainer, inputs_for("qwen3-tied", k))


@pytest.mark.parametrize("kwargs", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_layers_that_mix_sequences_are_refused_at_the_first_microbatch(kwargs, tmp_path):
    """A leading dimension of k that is not the sequences': here they are in another order."""

    model = make_model()
    layer = model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    layer.register_forward_hook(lambda module, args, output: output.flip(0))
    trainer = make_trainer(tmp_path, model, **kwargs)
    with pytest.raises(RuntimeError, match=r"wrong for `model.layers.0.mlp.gate_proj.weight`.*down_proj") as error:
        trainer_gradients(trainer, inputs_for("qwen3-tied", 4))
    assert "layers.1" not in str(error.value) and "self_attn" not in str(error.value)


def test_the_checks_of_the_first_microbatch_leave_no_trace(tmp_path):
    """Random numbers, metrics and gradients are those of a run without the checks."""
    model = make_model(attention_dropout=0.3)
    microbatches = inputs_for("qwen3-tied", 4)
    results = []
    for checked in (False, True):
        trainer = make_trainer(tmp_path, copy.deepcopy(model))
        trainer._checked = checked
        torch.manual_seed(5)
        gradients, losses = trainer_gradients(trainer, microbatches)
        results.append((gradients, losses, dict(trainer._metrics["train"]), torch.rand(())))
    (checked, losses, metrics, random), (plain, plain_losses, plain_metrics, plain_random) = results
    assert losses == plain_losses and metrics == plain_metrics and random == plain_random
    assert len(metrics["entropy"]) == len(microbatches)
    for name, grad in plain.items():
        assert torch.equal(checked[name], grad), name


def test_kernels_that_are_applied_when_training_begins_are_seen(tmp_path, monkeypatch):
    """As Liger's: a norm that takes no copies of its weight, set on single modules after the trainer was made."""

    def apply_kernels(model, config):
        def forward(self, hidden):
            assert self.weight.dim() == 1
            return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * self.weight

        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = MethodType(forward, module)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply_kernels)
    trainer = make_trainer(tmp_path)
    trainer.args.use_liger_kernel = True
    with pytest.raises(ValueError, match=r"(?s)`model.layers.0.self_attn.q_norm` \(Qwen3RMSNorm\).*batch_size=1"):
        trainer.train()


# Settings without effect


def test_one_microbatch_a_step_is_said_to_be_reinforce(tmp_path, caplog):
    with pytest.warns(
        UserWarning, match=r"`projection='iterative'` has no effect with `gradient_accumulation_steps=1`"
    ):
        trainer = make_trainer(tmp_path, gradient_accumulation_steps=1)
    trainer.train()
    assert [r.message for r in caplog.records if "has no effect" in r.message and r.name.startswith("proma_trl")]
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "PROMA" not in card.replace("proma-trl", "") and "projection" not in card and "REINFORCE" in card


def test_settings_that_act_are_not_warned_of(tmp_path, recwarn):
    make_trainer(tmp_path, projection_sweeps=3, projection_bound=None, projection_memory_budget=0.1)
    make_trainer(tmp_path, projection="none")
    assert not [w for w in recwarn if "has no effect" in str(w.message)]


# Refusals


def test_other_configurations_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `PROMAConfig`, got `GRPOConfig`"):
        make_trainer(tmp_path, args=make_args(tmp_path, GRPOConfig))


def test_token_level_advantages_are_refused_at_the_first_batch(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = make_inputs(4, 0)
    inputs["advantages"] = inputs["advantages"].unsqueeze(1).expand(-1, 7)
    with pytest.raises(ValueError, match=r"shape \(4, 7\) weigh tokens, not sequences.*GRPOTrainer"):
        trainer.compute_loss(trainer.model.train(), inputs)


def tiny_moe(**kwargs):
    config = Qwen3MoeConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        **kwargs,
    )
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def test_the_load_balancing_loss_of_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"load-balancing.*`router_aux_loss_coef=0.0`"):
        make_trainer(tmp_path, tiny_moe())


def test_experts_train_with_one_sequence_a_microbatch(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)`model.layers.0.mlp.experts` .*per_device_train_batch_size=1"):
        make_trainer(tmp_path, tiny_moe(), router_aux_loss_coef=0.0)
    trainer = make_trainer(
        tmp_path, tiny_moe(), router_aux_loss_coef=0.0, per_device_train_batch_size=1, generation_batch_size=4
    )
    check(trainer, inputs_for("qwen3-moe", 1))


def test_compiled_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"compiled model.*--dynamo_backend"):
        make_trainer(tmp_path)


def test_reducing_every_microbatch_is_refused(tmp_path):
    def reduce_each():  # transformers writes to what it is given
        return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}

    with pytest.raises(ValueError, match=r"`sync_each_batch`.*`projection=\"none\"`"):
        make_trainer(tmp_path, accelerator_config=reduce_each())
    make_trainer(tmp_path, accelerator_config=reduce_each(), projection="none")


def test_a_changed_fused_head_is_refused(tmp_path, monkeypatch):
    from trl.trainer import utils

    monkeypatch.delattr(utils, "_use_triton")
    with pytest.raises(RuntimeError, match=r"_use_triton.*Install a TRL version"):
        make_trainer(tmp_path)


def test_metrics_are_json(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    json.dumps(trainer.state.log_history, allow_nan=False)
