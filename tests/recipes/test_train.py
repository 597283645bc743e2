import json
from pathlib import Path

import pytest
import torch
import trl.rewards
from support.recipe import make_settings, read_metrics, read_weights, write_config

from proma_trl import cli
from proma_trl.recipes import train

REWARDS = '''
def even(completions, colour, **kwargs):
    """Rewards even digits; the dataset's column comes along."""
    assert set(colour) <= {"red", "blue"}
    return [float(completion[0]["content"].strip()[-1:] in tuple("02468")) for completion in completions]


NUMBER = 3
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "colour": "red" if n % 2 else "blue"}
        for n in range(8)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def settings(folder):
    settings = make_settings(folder)
    for name in ("format_reward_weight", "eval_every", "eval_samples"):
        del settings[name]
    return settings | {
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": [f"{folder}/rewards.py:even"],
    }


def test_run_from_the_command_line(folder, settings, capfd):
    """A process of its own, on a JSON Lines file with a reward function from a file, and TRL's evaluation."""
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "dataset_train_split": "train[:6]"}
    settings |= {"dataset_test_split": "train[6:]", "kl_every": 1, "max_prompt_length": 20}
    options = [
        "--num_processes",
        "1",
        "--config",
        write_config(folder, settings),
        "--accelerate_config",
        "cpu_2_ranks",
    ]
    assert cli.main(["train", *options]) == 0
    trained, initial = read_weights(settings["output_dir"]), read_weights(settings["model_name_or_path"])
    assert any(not torch.equal(trained[name], initial[name]) for name in trained)
    records = read_metrics(settings["output_dir"])
    assert [record["step"] for record in records if "reward" in record] == [1, 2]
    assert [record["step"] for record in records if "eval_reward" in record] == [1, 2]
    assert all("rewards/even/mean" in record for record in records if "reward" in record)
    assert {"kl/local", "projection/norm_ratio"} <= set().union(*records)
    assert "trained with PROMA" in (Path(settings["output_dir"]) / "README.md").read_text()
    assert f"Saved the policy, its card and metrics.jsonl in {settings['output_dir']}" in capfd.readouterr().out


def test_prompts_without_a_chat(folder, settings):
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (folder / "rewards.py").write_text("def length(completions, **kwargs):\n    return [*map(len, completions)]\n")
    settings |= {"reward_funcs": [f"{folder}/rewards.py:length"], "algorithm": "grpo", "max_steps": 1}
    train.main(["--config", write_config(folder, settings)])
    assert any("rewards/length/mean" in record for record in read_metrics(settings["output_dir"]))


def test_named_and_imported_rewards(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert train.load_reward("accuracy_reward") is trl.rewards.accuracy_reward
    assert train.load_reward("rewards.even").__name__ == "even"
    assert train.load_reward("rewards:even").__name__ == "even"
    assert train.load_reward("rewards.py:even").__name__ == "even"
    assert train.load_reward("proma_trl.tools.rewards.format_reward").__module__ == "proma_trl.tools.rewards"
    assert all(callable(train.load_reward(name)) for name in train.NAMED_REWARDS)


@pytest.mark.parametrize(
    "name", ["nonsense", "rewards.py:odd", "rewards.py", "nowhere.py:even", "no_such_module.even", "rewards.py:NUMBER"]
)
def test_rewards_that_are_not_there(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"reward_funcs: '{name}'.* Name "):
        train.load_reward(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "dataset_name is not set. Set it to"),
        ({"reward_funcs": None}, "reward_funcs is not set. Name one or more"),
        ({"model_name_or_path": None}, "model_name_or_path is not set"),
        ({"dataset_train_split": "training"}, "has no split 'training'"),
        ({"kl_every": -1}, "kl_every=-1 is negative"),
    ],
)
def test_errors_of_the_settings(folder, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(["--config", write_config(folder, settings | changes)])


def test_a_dataset_without_prompts(folder, settings):
    (folder / "prompts.jsonl").write_text('{"question": "one"}\n')
    with pytest.raises(ValueError, match=r"lacks the column\(s\) prompt; it has question. Rename"):
        train.main(["--config", write_config(folder, settings)])


def test_a_reward_that_is_no_list(folder, settings):
    """No traceback: the error is in the user's function, and one sentence says where."""
    (folder / "rewards.py").write_text("def half(completions, **kwargs):\n    return 0.5\n")
    settings |= {"reward_funcs": f"{folder}/rewards.py:half"}
    with pytest.raises(SystemExit, match=r"rewards.py:half returned 0.5, and not a list with one number"):
        train.main(["--config", write_config(folder, settings)])


def test_the_baseline_says_what_it_does(folder, settings, capsys):
    settings |= {"algorithm": "grpo", "max_steps": 1}
    train.main(["--config", write_config(folder, settings)])
    assert "GRPO (clipping 0.2): 16 sequences a step = 2 microbatches x 8 = 2 prompts x 8" in capsys.readouterr().out


def test_images_are_not_counted(folder, settings):
    (folder / "prompts.jsonl").write_text('{"prompt": "one", "colour": "red", "image": "one.png"}\n' * 2)
    with pytest.raises(ValueError, match="max_prompt_length is not available for prompts with images"):
        train.main(["--config", write_config(folder, settings | {"max_prompt_length": 20})])
