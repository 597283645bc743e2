"""Runs of recipes/gsm8k.py on tiny policies and a handful of problems."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from proma_trl.recipes import figure2
from support.tiny import make_policy, make_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "gsm8k.py"


def write_problems(path, numbers):
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_settings(tmp_path):
    """A run of two steps with a tiny random policy, as the settings of a YAML file."""
    tokenizer = make_tokenizer()
    # One digit at random is right often enough for rewards that differ.
    no_digits = [index for token, index in tokenizer.get_vocab().items() if token not in "12345678"]
    for saved in (tokenizer, make_policy(tokenizer)):
        saved.save_pretrained(tmp_path / "policy")
    (tmp_path / "problems").mkdir()
    write_problems(tmp_path / "problems" / "train.jsonl", range(8))
    write_problems(tmp_path / "problems" / "test.jsonl", range(20, 25))
    return {
        "model_name_or_path": str(tmp_path / "policy"),
        "dataset_name": str(tmp_path / "problems"),
        "output_dir": str(tmp_path / "run"),
        "projection": "exact",
        "projection_bound": None,
        "format_reward_weight": 0.5,
        "eval_every": 1,
        "eval_samples": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 8,
        "max_completion_length": 1,
        "generation_kwargs": {"suppress_tokens": no_digits},
        "learning_rate": 1.0e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }


def write_config(tmp_path, settings):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def run_recipe(*arguments, launcher=("--cpu", "--num_processes", "1")):
    """Runs the recipe as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(RECIPE), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def read_weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def planned_runs(monkeypatch):
    """The list that `figure2.main` then fills with the runs that it would execute; it makes no task and no figure."""
    planned = []
    for name in ("write_task", "write_problems"):
        monkeypatch.setattr(figure2, name, lambda folder, **kwargs: folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(figure2, "execute_all", lambda runs, *rest: planned.extend(runs))
    monkeypatch.setattr(figure2, "read_curves", lambda folder: {"eval_accuracy": {1: 1.0}})
    monkeypatch.setattr(figure2, "draw_sweep", lambda *arguments: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return planned
