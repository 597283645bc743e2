"""What trackers get, and under which names: TensorBoard's files; recorders in the place of trackio and wandb."""

import re
import struct
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import trl
from datasets import Dataset
from support.harness import make_trainer
from tensorboardX.proto.event_pb2 import Event

from proma_trl.tools.callbacks import GreedyEvaluation
from proma_trl.tools.policy_metrics import PolicyMetrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
# What trackio leaves out, and wandb keeps elsewhere
ONCE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def train(output_dir, report_to, **settings):
    """Three steps with everything that is logged in them. Returns the trainer's records."""
    prompts = Dataset.from_dict({"prompt": ["ab", "cde"]})
    trainer = make_trainer(
        output_dir,
        report_to=report_to,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=prompts,
        **settings,
    )
    problems = Dataset.from_dict({"prompt": ["1 + 1?"], "answer": ["2"]})
    trainer.add_callback(GreedyEvaluation(trainer, problems, every_steps=2))
    trainer.add_callback(PolicyMetrics(trainer, lag=1))
    trainer.train()
    return trainer.state.log_history


def expected(log_history):
    """`{(name, step): value}` as trackers are to have it."""
    points = {}
    for record in log_history:
        for name, value in record.items():
            if name != "step" and value is not None:
                tracked = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                points[tracked, record["step"]] = value
    names = {name for name, _ in points}
    families = {"train/projection/overlap", "train/kl/local", "train/kl/lagged", "train/kl/global", "train/entropy"}
    assert families | {"train/reward", "train/rewards/vowel_reward/mean", "eval/accuracy", "eval/reward"} <= names
    assert {step for name, step in points if name == "eval/accuracy"} == {0, 2, 3}
    return points


def read_events(path):
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4


def test_tensorboard(tmp_path):
    wanted = expected(train(tmp_path, "tensorboard"))
    # One file: none was begun after the run had ended.
    (path,) = tmp_path.rglob("*tfevents*")
    found = {
        (value.tag, event.step): value.simple_value
        for event in read_events(path)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    }
    assert found == {point: pytest.approx(value, rel=1e-6) for point, value in wanted.items()}


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_trackers_that_are_modules(tmp_path, monkeypatch, tracker):
    calls = MagicMock()
    module = types.ModuleType(tracker)
    module.__spec__, module.__version__ = ModuleSpec(tracker, None), "1.0"
    module.__getattr__ = lambda name: getattr(calls, name)
    monkeypatch.setitem(sys.modules, tracker, module)
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", types.SimpleNamespace(ConfigError=RuntimeError))
    monkeypatch.setattr(trl.extras.profiling, tracker, module, raising=False)

    wanted = {
        (name, step): value
        for (name, step), value in expected(train(tmp_path, tracker)).items()
        if name.removeprefix("train/") not in ONCE
    }
    found = {}
    for call in calls.log.call_args_list:
        (values,) = call.args
        # TRL's own timing of its functions goes to trackers alone.
        if not all(name.startswith("profiling/") for name in values):
            step = values.pop("train/global_step")
            found |= {(name, step): value for name, value in values.items() if value is not None}
    assert found == wanted
    # One run, which is not closed before it has everything
    order = [name for name, *_ in calls.mock_calls if name in ("init", "log", "finish")]
    assert order[-1] == ("finish" if tracker == "trackio" else "log")
    assert order.count("finish") == (tracker == "trackio")


@pytest.mark.parametrize(
    "settings", [{}, {"isopo": "natural", "intra_dim": 2}, {"divergence": "topk_tv", "ratio_cap": 5.0}]
)
def test_every_metric_is_documented(settings, tmp_path):
    documented = re.findall(r"`([\w<>*/]+)`", "".join(re.findall(r"^\| (`.*?) \|", DOCS.read_text(), re.MULTILINE)))
    patterns = [re.sub(r"<\w+>|\*", r"\\w+", name) for name in documented if name != "eval_<name>"]
    names = {name.removeprefix("eval_") for record in train(tmp_path, "none", **settings) for name in record} - {
        "step"
    }
    missing = {n for n in names if not any(re.fullmatch(p.removeprefix("eval_"), n) for p in patterns)}
    assert missing == set()
