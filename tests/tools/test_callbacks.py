import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.tiny import make_policy, make_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import proma_trl.tools.callbacks
from proma_trl.tools.callbacks import GreedyEvaluation, JSONLMetrics
from proma_trl.tools.data import build_prompt, tokenize_prompts

QUESTIONS = ["1 + 1?", "12 + 30, and 7 more?", "9 - 5 = ?", "What is 3 * 3?", "8?"]


def make_dataset(conversational=True):
    return Dataset.from_dict(
        {
            "prompt": [build_prompt(question, conversational) for question in QUESTIONS],
            "answer": ["2", "49", "4", "9", "8"],
        }
    )


def count_vowels(completions, **kwargs):
    """A reward that differs between samples of a random policy."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(sum(character in "aeiouAEIOU" for character in text)) for text in texts]


def make_trainer(output_dir, tokenizer=None, peft_config=None, **settings):
    tokenizer = tokenizer or make_tokenizer()
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    } | settings
    return GRPOTrainer(
        model=make_policy(tokenizer),
        reward_funcs=count_vowels,
        args=GRPOConfig(str(output_dir), **settings),
        train_dataset=make_dataset(tokenizer.chat_template is not None),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def read_metrics(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def decode_greedily(trainer, prompt):
    """The definition: one prompt, no padding, no cache, the likeliest token each time."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    ids = tokenize_prompts([prompt], tokenizer)[0]
    completion = []
    for _ in range(trainer.args.max_completion_length):
        token = model(torch.tensor([ids + completion])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        completion.append(token)
    model.train()
    return tokenizer.decode(completion, skip_special_tokens=True)


@pytest.mark.parametrize("conversational", [False, True])
def test_accuracy_is_that_of_greedy_decoding(tmp_path, monkeypatch, conversational):
    trainer = make_trainer(tmp_path, make_tokenizer(chat_template=conversational))
    # Large weights, for completions that depend on their prompts.
    torch.manual_seed(0)
    for parameter in trainer.model.model.layers.parameters():
        parameter.data.normal_()
    # Settings that a model brings along must not leak into the evaluation.
    trainer.model.generation_config.do_sample = True
    trainer.model.generation_config.repetition_penalty = 5.0
    prompts = make_dataset(conversational)["prompt"]
    expected = [decode_greedily(trainer, prompt) for prompt in prompts]
    assert len(set(expected)) == len(expected)

    def is_equal(texts, answers):
        return [float(text == answer) for text, answer in zip(texts, answers, strict=True)]

    monkeypatch.setattr(proma_trl.tools.callbacks, "accuracy_reward", is_equal)
    right = Dataset.from_dict({"prompt": prompts, "answer": expected})
    assert GreedyEvaluation(trainer, right, every_steps=1).evaluate() == 1.0
    some_wrong = Dataset.from_dict({"prompt": prompts, "answer": [*expected[:3], "wrong", "wrong"]})
    assert GreedyEvaluation(trainer, some_wrong, every_steps=1).evaluate() == pytest.approx(3 / 5)
    assert trainer.model.training


def test_unscored_problems_count_as_unsolved(tmp_path):
    dataset = Dataset.from_dict({"prompt": make_dataset()["prompt"], "answer": ["unknown"] * len(QUESTIONS)})
    assert GreedyEvaluation(make_trainer(tmp_path), dataset, every_steps=1).evaluate() == 0.0


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": False}, {"bf16": True}, {"peft": True}])
def test_evaluation_leaves_training_as_it_is(tmp_path, settings):
    def train(output_dir, evaluate):
        options = dict(settings)
        peft_config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"]) if options.pop("peft", False) else None
        trainer = make_trainer(output_dir, peft_config=peft_config, log_completions=True, **options)
        if evaluate:
            trainer.add_callback(GreedyEvaluation(trainer, make_dataset(), every_steps=2))
        trainer.train()
        weights = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
        random_state = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
        train_records = [
            {key: value for key, value in record.items() if key != "step_time"}
            for record in trainer.state.log_history
            if "reward" in record
        ]
        return weights, random_state, train_records, trainer

    weights, state, records, _ = train(tmp_path / "a", evaluate=False)
    weights_evaluated, state_evaluated, records_evaluated, trainer = train(tmp_path / "b", evaluate=True)
    assert all(torch.equal(weights[name], weights_evaluated[name]) for name in weights)
    assert torch.equal(state[0], state_evaluated[0])
    assert state[1:] == state_evaluated[1:]
    assert records == records_evaluated
    assert len(records) == 4
    assert trainer.log_completions
    assert trainer.model.is_gradient_checkpointing == settings.get("gradient_checkpointing", True)


def test_evaluation_before_during_and_after(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.add_callback(GreedyEvaluation(trainer, make_dataset(), every_steps=2))
    trainer.train()
    evaluated = [record for record in trainer.state.log_history if "eval_accuracy" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 4, 5]
    assert all(set(record) <= {"eval_accuracy", "epoch", "step"} for record in evaluated)


def test_every_steps_is_checked(tmp_path):
    with pytest.raises(ValueError, match="every_steps=0 has to be at least 1"):
        GreedyEvaluation(make_trainer(tmp_path), make_dataset(), every_steps=0)


@pytest.mark.parametrize("metrics_first", [False, True])
def test_metrics_file_holds_the_log(tmp_path, metrics_first):
    trainer = make_trainer(tmp_path)
    callbacks = [GreedyEvaluation(trainer, make_dataset(), every_steps=2), JSONLMetrics()]
    for callback in reversed(callbacks) if metrics_first else callbacks:
        trainer.add_callback(callback)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "of": "an earlier run"}\n')
    trainer.train()
    assert read_metrics(tmp_path) == json.loads(json.dumps(trainer.state.log_history))


def test_numbers_that_are_not_finite(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.add_callback(JSONLMetrics())

    class LogsNaN(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({"nan": float("nan"), "inf": float("inf"), "one": 1.0})

    trainer.add_callback(LogsNaN())
    trainer.train()
    record = next(record for record in read_metrics(tmp_path) if "one" in record)
    assert (record["nan"], record["inf"], record["one"]) == (None, None, 1.0)


def test_resumed_run_continues_the_metrics_file(tmp_path):
    def make(max_steps):
        trainer = make_trainer(
            tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        trainer.add_callback(GreedyEvaluation(trainer, make_dataset(), every_steps=2))
        trainer.add_callback(JSONLMetrics())
        return trainer

    make(max_steps=3).train()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 2, 3, 3, 3]
    # As if the run had been killed while it was writing.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    resumed = make(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2, 2, 3, 4, 4, 4]
    assert [record["step"] for record in records if "eval_accuracy" in record] == [0, 2, 4]
    assert records == json.loads(json.dumps(resumed.state.log_history))
