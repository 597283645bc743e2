"""The command `proma-trl`: what it launches, and that it says early what is wrong."""

import subprocess
import sys
from importlib.metadata import entry_points
from typing import get_args

import pytest
import torch
import yaml
from support.tiny import make_policy, make_tokenizer

import proma_trl
from proma_trl import check, cli
from proma_trl.recipes import demo, figure2, train
from proma_trl.recipes.algorithms import Algorithm


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
    monkeypatch.setattr(figure2, "check_options", lambda options: None)
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


REWARDS = """
def even(completions, colour, **kwargs):
    return [0.0 for _ in completions]

async def later(completions, **kwargs):
    return [0.0 for _ in completions]

NUMBER = 3
"""
OPTIONS = "--model_name_or_path policy --dataset_name prompts.jsonl --reward_funcs rewards.py:even".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with what `OPTIONS` name."""
    tokenizer = make_tokenizer()
    for saved in (tokenizer, make_policy(tokenizer)):
        saved.save_pretrained(tmp_path / "policy")
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "colour": "red"}\n' * 16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_goes_through_accelerate(launched, folder):
    options = [*OPTIONS, "--config=run.yaml"]
    (folder / "run.yaml").write_text("use_cpu: true\n")
    assert cli.main(["train", "--num_processes", "1", *options, "--accelerate_config", "zero2", "--", "--cpu"]) == 0
    (launch,) = launched
    assert launch.num_processes == 1 and launch.config_file.endswith("accelerate/zero2.yaml") and launch.cpu
    assert launch.module and launch.training_script == train.__name__
    assert launch.training_script_args == options


def refusal(command, options, capsys):
    """What the command says, which takes few lines."""
    with pytest.raises(SystemExit) as done:
        cli.main([command, *options])
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert done.value.code == 2 and len(lines) <= 12 and not said.out
    assert lines[0].startswith(f"usage: proma-trl {command} ") and "Traceback" not in said.err
    assert lines[1].startswith(f"proma-trl {command}: error: ")
    return "\n".join(lines[1:])


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--lerning_rate 1e-4", ["unknown option `--lerning_rate`; did you mean `--learning_rate`?"]),
        ("--num_proceses 2", ["unknown option `--num_proceses`; did you mean `--num_processes`?"]),
        ("--frobnicate 1 --beta 0.1", ["unknown option `--frobnicate`.", "`beta=0.1` is not available with PROMA"]),
        ("--num_processes two", ["accelerate launch: argument --num_processes", "invalid int value: 'two'"]),
        ("-- --cpuu", ["accelerate launch: unrecognized arguments: --cpuu"]),
        ("--accelerate_config zero9", ["--accelerate_config: there is no file 'zero9'"]),
        ("--num_processes 2 stray", ["unexpected 'stray'"]),
        ("--max_steps many", ["argument --max_steps/--max-steps: invalid int value: 'many'"]),
        ("--reward_funcs nonsense", ["reward_funcs: 'nonsense' can't be loaded"]),
        ("--reward_funcs rewards.py:NUMBER", ["reward_funcs: 'rewards.py:NUMBER' is 3"]),
        (
            "--beta 0.04 --epsilon 0.1 --projection_bound -2 --projection_sweeps 0 --learning_rate -1",
            ["`beta=0.04`", "`epsilon=0.1`", "`projection_bound`", "`projection_sweeps`"],
        ),
        ("--learning_rate -1 --max_steps 0", ["learning_rate=-1.0 is negative", "max_steps=0 is not positive"]),
        ("--algorithm grpo --num_train_epochs 0", ["num_train_epochs=0.0 is not positive"]),
        ("--algorithm ppo", ["--algorithm: 'ppo' is none of proma, "]),
        ("--model_name_or_path ./nomodel", ["='./nomodel' is no folder.", "proma-trl demo", "runs/demo/warm_start"]),
        ("--model_name_or_path .", ["='.' is a folder without a model that can be read"]),
        ("--model_name_or_path no/model", ["neither a local folder nor a model within reach"]),
        ("--dataset_name nope.jsonl", ["dataset_name='nope.jsonl' is neither a local file"]),
        ("--dataset_name questions.jsonl", ["lacks the column(s) prompt; it has question"]),
        ("--dataset_name broken.jsonl", ["broken.jsonl, line 21: not valid JSON (Expecting ':' delimiter)"]),
        ("--dataset_name list.jsonl", ["list.jsonl, line 2: not an object"]),
        (
            "--dataset_name mixed.jsonl",
            ["mixed.jsonl, row 1: its prompt is neither a text nor a list of messages: [1, "],
        ),
        ("--dataset_name empty.jsonl", ["empty.jsonl is empty"]),
        ("--dataset_name colourless.jsonl", ["rewards.py:even needs a column `colour`; colourless.jsonl has prompt"]),
        ("--reward_funcs accuracy_reward", ["accuracy_reward needs a column `solution`; prompts.jsonl has prompt, c"]),
        ("--reward_weights 1 2", ["`reward_weights` has 2 values for 1 reward function (rewards.py:even)"]),
        (
            "--dataset_train_split train[:5]",
            ["prompts.jsonl: 5 prompts are too few", "16 prompts at a time", "gradient_accumulation_steps=5`"],
        ),
        ("--num_processes 2", ["16 prompts are too few", "32 prompts at a time"]),
        ("--algorithm grpo --dataset_train_split train[:5]", ["5 prompts are too few", "16 prompts at a time"]),
        ("--resume_from_checkpoint true", ["there is no checkpoint in trainer_output"]),
        ("--config nope.yaml", ["--config: there is no file 'nope.yaml'"]),
        ("--config", ["argument --config: expected one argument"]),
        ("--config broken.yaml", ["broken.yaml, line 2: not valid YAML (mapping values are not allowed here)"]),
        ("--config list.yaml", ["list.yaml: not a file of settings"]),
        (
            "--config typo.yaml",
            [
                "typo.yaml: unknown setting `lerning_rate`; did you mean `learning_rate`?",
                "typo.yaml: unknown setting `epochs`",
                "typo.yaml: `max_steps: many`: must be a whole number.",
                "typo.yaml: `eval_strategy: maybe`: must be one of no, steps, epoch.",
                "typo.yaml: `weight_decay: [1, 2]`: takes one value, not a list.",
                "`beta=0.1`",
            ],
        ),
    ],
)
def test_train_says_early_what_is_wrong(launched, folder, capsys, options, messages):
    row = '{"prompt": "a"}\n'
    for name, text in {
        "questions.jsonl": row.replace("prompt", "question"),
        "broken.jsonl": row * 20 + '{"prompt" "a"}\n' + row,
        "list.jsonl": row + "[1]\n",
        "mixed.jsonl": row + '{"prompt": [1, {"a": 2}]}\n' + row,
        "empty.jsonl": "",
        "colourless.jsonl": row,
        "broken.yaml": "max_steps: 3\nlearning_rate: a: b\n",
        "list.yaml": "- 1\n",
        "typo.yaml": "lerning_rate: 1\nepochs: 3\nmax_steps: many\neval_strategy: maybe\nweight_decay: [1, 2]\n"
        "beta: 0.1\n",
    }.items():
        (folder / name).write_text(text)
    said = refusal("train", [*OPTIONS, *options.split()], capsys)
    assert all(message in said for message in messages), said
    assert not launched


def test_train_without_options(launched, capsys):
    said = refusal("train", [], capsys)
    assert all(f"{name} is not set" in said for name in ("dataset_name", "reward_funcs", "model_name_or_path"))


@pytest.mark.parametrize("command", ["train", "compare", "check", "demo"])
def test_help_names_the_command_that_was_given(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    try:
        assert cli.main([command, "--help"]) == 0
    except SystemExit as done:
        assert done.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: proma-trl {command} ") and f"    proma-trl {command}" in text
    assert "python -m" not in text.partition("options:")[0].replace("python -m\nproma_trl.recipes.gsm8k", "")


def test_faults_of_a_program_are_shown_whole(launched, folder):
    """An error of the user's code is no wrong option."""
    (folder / "rewards.py").write_text("def even(completions, **kwargs):\n    return []\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *OPTIONS])


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--config nope_cpu", ["no file 'nope_cpu'", "figure2_cpu, figure2_dppo_cpu, figure2_smollm2_cpu"]),
        ("--config figure2_cpu --algorithms promma", ["'promma' is none of proma"]),
        ("--config figure2_cpu --lerning_rate 1", ["unknown option `--lerning_rate`; did you mean `--learning_rate`"]),
        ("--config figure2_cpu --beta 0.1", ["`beta=0.1` is not available"]),
        ("--config figure2_cpu --model_name_or_path ./nomodel", ["'./nomodel' is no folder"]),
        ("--max_steps 1", ["model_name_or_path is not set"]),
        ("", ["max_steps is not set"]),
    ],
)
def test_compare_says_early_what_is_wrong(monkeypatch, capsys, options, messages):
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    said = refusal("compare", options.split(), capsys)
    assert all(message in said for message in messages), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name a model"),
        ("./nomodel", "'./nomodel' is no folder"),
        ("no/model", "neither a local folder nor a model within reach"),
        ("policy --microbatch_size 0", "--microbatch_size: 0 is not positive"),
        ("policy --microbach_size 2", "unknown option --microbach_size; did you mean --microbatch_size?"),
    ],
)
def test_check_says_early_what_is_wrong(monkeypatch, folder, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    assert message in refusal("check", options.split(), capsys)


def test_the_model_may_be_named_as_train_names_it(monkeypatch, folder, capsys):
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    assert cli.main(["check", "--model_name_or_path", "policy"]) == 0
    assert capsys.readouterr().out.startswith("policy (Qwen3ForCausalLM)")


def test_yaml(launched, folder):
    """YAML's own view of `no`, `1e-6` and of one value where a list may stand."""
    (folder / "run.yaml").write_text(
        "model_name_or_path: policy\ndataset_name: prompts.jsonl\nreward_funcs: rewards.py:even\n"
        "reward_weights: 1e-1\nlearning_rate: 1e-6\neval_strategy: no\nsave_strategy: off\nisopo: no\n"
        "lora_target_modules: q_proj\nuse_cpu: on\nreport_to: none\nprojection_bound: null\nscale_rewards: no\n"
        "logging_first_step: yes\ndataset_config: no\n"
    )
    assert cli.main(["train", "--config", "run.yaml"]) == 0
    args, training_args, model_args = train.parse(train.TrainArguments, launched[0].training_script_args, None)
    assert args.reward_funcs == ["rewards.py:even"] and args.dataset_config == "no"
    assert training_args.reward_weights == [0.1] and training_args.learning_rate == 1e-6
    assert training_args.eval_strategy == training_args.save_strategy == "no" and training_args.isopo == "none"
    assert training_args.use_cpu and training_args.logging_first_step and training_args.projection_bound is None
    assert training_args.scale_rewards == "none" and training_args.report_to == []
    assert model_args.lora_target_modules == ["q_proj"] or model_args.lora_target_modules == "q_proj"


@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_all_algorithms_take_the_same_batch(launched, folder, algorithm):
    assert cli.main(["train", *OPTIONS, "--algorithm", algorithm]) == 0
    _, args, _ = train.parse(train.TrainArguments, launched[0].training_script_args, None)
    assert (args.gradient_accumulation_steps, args.per_device_train_batch_size) == (16, 8)
    assert args.steps_per_generation == 16 and args.num_generations == 8
    # The same precision on a CPU, too
    if not torch.accelerator.is_available():
        assert args.use_cpu and not args.bf16
