"""The command `proma-trl`: what it launches, and that it says early what is wrong."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import yaml
from support.recipe import write_config

import proma_trl
from proma_trl import check, cli
from proma_trl.recipes import demo, figure2, train


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="proma-trl")
    assert command.load() is cli.main


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"proma-trl {proma_trl.__version__}\n"
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and all(f"    {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_unknown_commands(capsys, arguments):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2 and "proma-trl: error: " in capsys.readouterr().err


def test_finding_the_command_loads_no_torch():
    script = (
        "from proma_trl.cli import main\nimport sys\ntry:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
    )
    script += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.endswith("False\n")


@pytest.mark.parametrize(("name", "module"), [("compare", figure2), ("demo", demo), ("check", check)])
def test_options_reach_the_command(monkeypatch, name, module):
    seen = []
    monkeypatch.setattr(module, "main", lambda options: seen.append((sys.argv[0], options)))
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    assert cli.main([name, "--seed", "3"]) == 0
    assert seen == [(f"proma-trl {name}", ["--seed", "3"])]


def test_exit_status(monkeypatch):
    monkeypatch.setattr(check, "main", lambda options: 1)
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    assert cli.main(["check", "model"]) == 1


@pytest.mark.parametrize("options", [["--config", "figure2_cpu"], ["--config=figure2_cpu"]])
def test_settings_by_name(monkeypatch, options):
    seen = []
    monkeypatch.setattr(figure2, "main", seen.extend)
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    cli.main(["compare", *options, "--jobs", "2"])
    assert seen[0] == "--config" and seen[2:] == ["--jobs", "2"]
    with open(seen[1]) as file:
        assert yaml.safe_load(file)["word_problems"] == "hard"
    assert {"zero2", "cpu_2_ranks"} <= set(cli.names("accelerate"))


@pytest.fixture
def launched(monkeypatch):
    """The options of `accelerate launch`, which does not run."""
    seen = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    return seen


OPTIONS = ["--model_name_or_path", "model", "--dataset_name", "data", "--reward_funcs", "accuracy_reward", "--use_cpu"]


def test_train_goes_through_accelerate(launched):
    assert cli.main(["train", "--num_processes", "2", *OPTIONS, "--accelerate_config", "zero2"]) == 0
    (launch,) = launched
    assert launch.num_processes == 2 and launch.config_file.endswith("accelerate/zero2.yaml")
    assert launch.module and launch.training_script == train.__name__
    assert launch.training_script_args == OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no_such_option", "1"], "unrecognized arguments: --no_such_option"),
        (["--reward_funcs", "nonsense"], "reward_funcs: 'nonsense' can't be loaded"),
        (["--projection_sweeps", "0"], "projection_sweeps"),
        (["--algorithm", "ppo"], "--algorithm: 'ppo' is none of"),
        (["--beta", "0.1"], "`beta=0.1` is not available with PROMA"),
    ],
)
def test_train_says_early_what_is_wrong(launched, capsys, options, message):
    with pytest.raises(SystemExit) as done:
        cli.main(["train", *OPTIONS, *options])
    assert done.value.code == 2 and message in capsys.readouterr().err and not launched


def test_unknown_settings_in_the_file(launched, tmp_path, capsys):
    config = write_config(tmp_path, {"epochs": 3})
    with pytest.raises(SystemExit):
        cli.main(["train", *OPTIONS, "--config", config])
    assert "unknown settings in the file: --epochs 3" in capsys.readouterr().err and not launched
