"""
The first training of a new user, as README, quickstart and docs/cli.md show it: in an empty folder, with a local model
and local data instead of the Hub's, and nothing else changed.
"""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
from support.recipe import read_metrics
from support.tiny import make_policy, make_tokenizer

import proma_trl
from proma_trl import PROMATrainer, cli
from proma_trl.recipes import train

ROOT = Path(__file__).parents[2]
MODEL, DATASET = "Qwen/Qwen3-0.6B", "trl-lib/DeepMath-103K"
BLOCKS = {
    name: re.search(r"```python\n(.*?PROMATrainer\(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)[1]
    for name in ("README.md", "docs/quickstart.md")
}
PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
FILES = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("proma-trl train ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    for saved in (tokenizer, make_policy(tokenizer)):
        saved.save_pretrained(tmp_path / "policy")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 1?"}], "solution": f"${n + 1}$"} for n in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in FILES:
        (tmp_path / name).write_text(text.replace(MODEL, "policy"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launched(monkeypatch):
    """The options of the training, which does not run in a process of its own."""
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda launch: seen.append(launch))
    monkeypatch.setattr("sys.argv", ["proma-trl"])
    return seen


def options_of(command):
    return ["policy" if word == MODEL else word for word in shlex.split(command)[1:]]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_not_refused(folder, launched, command):
    assert cli.main(options_of(command)) == 0
    assert launched


@pytest.mark.slow
def test_the_first_command_trains(folder, launched, capsys):
    cli.main(options_of(COMMANDS[0]))
    train.main(launched[0].training_script_args)
    printed = capsys.readouterr().out
    assert (
        "PROMA (iterative, 2 sweeps, bound 0.5): 128 sequences a step = 16 microbatches x 8 = 16 prompts x 8"
        in printed
    )
    assert "Saved the policy" in printed and read_metrics("runs/brevity")[-1]["step"] == 3


@pytest.mark.parametrize("page", BLOCKS)
@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_python(folder, monkeypatch, page, trains):
    made = []

    def begin(trainer):
        made.append(trainer)
        if trains:
            PROMATrainer.train(trainer)

    monkeypatch.setattr(proma_trl, "PROMATrainer", type("PROMATrainer", (PROMATrainer,), {"train": begin}))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **kwargs: load({DATASET: "data"}[name], **kwargs))
    exec(BLOCKS[page].replace(MODEL, "policy"), {})
    (trainer,) = made
    assert len(trainer.get_train_dataloader()) >= trainer.args.gradient_accumulation_steps == 16
    assert trainer.state.global_step == (3 if trains else 0)
