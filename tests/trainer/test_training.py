"""Whole runs of the trainer: steps, logs, checkpoints, resuming."""

import copy
import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support import oracle
from support.harness import (
    LORA,
    TOKENIZER,
    GradientRecorder,
    definition,
    make_args,
    make_model,
    make_trainer,
    vowel_reward,
)
from support.models import WITHOUT_RULES
from transformers import AutoModelForCausalLM

from proma_trl import PROMAConfig, PROMATrainer


@pytest.mark.parametrize("architecture", ["qwen3-tied", *WITHOUT_RULES])
@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing": True, "loss_type": "grpo"}])
def test_what_reaches_the_optimizer_in_training(kwargs, architecture, tmp_path):
    recorder = GradientRecorder()
    trainer = make_trainer(tmp_path, make_model(architecture), callbacks=[recorder], max_grad_norm=0.0, **kwargs)
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


def test_metrics_are_json(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_adapters_in_float32_on_a_frozen_model_in_bfloat16(tmp_path):
    """The first microbatch's check allows for the rounding of layers that are not trained."""
    model = get_peft_model(make_model("llama-untied", dtype=torch.bfloat16), LORA)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert trainer.state.log_history[0]["projection/norm_ratio"] > 0
