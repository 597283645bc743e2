"""
The commands of README and docs, read from the text: each runs here on something tiny, or, where it needs a GPU, a
server or hours, its options are those that its program takes. A command that is neither fails the test.
"""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from support.recipe import planned_runs, write_problems
from support.tiny import make_policy, make_tokenizer

from proma_trl import check, cli
from proma_trl.recipes import demo, frontier, gsm8k, sums, train, training
from proma_trl.recipes.frontier_summary import score_all

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "results").glob("*/README.md")),
]
PROGRAMS = "accelerate launch|bash|make|pip install|proma-trl|python|trackio|vllm serve"
INLINE = re.compile(rf"(?<!`)`((?:{PROGRAMS})\s[^`]+)`(?!`)")
FENCE = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")

# In the place of what takes a GPU or hours: options that win, as they come last
SMALL = (
    "--model_name_or_path policy --max_steps 1 --num_generations 2 --per_device_train_batch_size 2 --use_cpu true "
    "--gradient_accumulation_steps 2 --steps_per_generation 2 --max_completion_length 2 --max_prompt_length 400 "
    "--bf16 false --dtype float32 --use_vllm false --report_to none --save_strategy no --kl_every 0"
).split()


def commands_of(text):
    """Commands in fences, one a line unless it ends with a backslash, and in the running text."""
    for body in FENCE.findall(text):
        for line in body.replace("\\\n", " ").splitlines():
            if shlex.split(line, comments=True):
                yield line
    for command in INLINE.findall(FENCE.sub("", text)):
        # `proma-trl train`, or what a sentence says of a command that stands elsewhere
        if "..." not in command and not (command.startswith("proma-trl ") and len(command.split()) == 2):
            yield command


def normal(command):
    """A command's words, without comments and assignments of environment variables."""
    words = shlex.split(command, comments=True)
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return words


FOUND = [(page, command) for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))]
# What a page says twice runs once
COMMANDS = {" ".join(normal(command)): (page, normal(command)) for page, command in FOUND}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands find around them: a policy, problems, and the files that the docs show."""
    folder = tmp_path_factory.mktemp("commands")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "policy")
    make_policy(tokenizer).save_pretrained(folder / "policy")
    (folder / "problems").mkdir()
    for name, numbers in (("train", range(8)), ("test", range(20, 25))):
        write_problems(folder / "problems" / f"{name}.jsonl", numbers)
    for page in PAGES:
        shown = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for name, text in shown:
            # Out of reach here, and checked before anything is launched
            (folder / name).write_text(text.replace("Qwen/Qwen3-0.6B", "policy"))
    for name in ("recipes", "benchmarks", "scripts", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    return folder


class Parsed(Exception):
    """The program took its options, and would start now."""


def run_make(words, folder, monkeypatch):
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_pip(words, folder, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [word for word in words[2:] if not word.startswith("-")]
    assert named
    for word in named:
        requirement = Requirement(word.replace(".", "proma-trl", 1) if word.startswith(".") else word)
        if requirement.name == "proma-trl":
            assert requirement.extras <= set(project["optional-dependencies"])


def parse_only(script, options, folder, monkeypatch):
    """Runs a script up to where its own parser has taken all options."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **kwargs):
        parse(self, *arguments, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def run_python(words, folder, monkeypatch):
    if words[1:3] == ["-m", "proma_trl.check"]:
        run_check(["proma-trl", "check", *words[3:]], folder, monkeypatch)
    elif words[1:3] == ["-m", "pytest"]:
        assert words[3:] and all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
    elif words[1:3] == ["-m", "twine"]:
        assert "\ntwine==" in (ROOT / "requirements" / "tested_package.txt").read_text()
    elif words[1] == "recipes/figure2.py":
        run_compare(["proma-trl", "compare", *words[2:]], folder, monkeypatch)
    elif words[1] == "recipes/frontier.py":
        run_frontier(words[2:], folder, monkeypatch)
    elif words[1] == "recipes/gsm8k.py":
        run_recipe(gsm8k, words[2:], folder, monkeypatch)
    elif words[1] == "recipes/sums.py":
        run_recipe(sums, words[2:], folder, monkeypatch)
    else:
        script = ROOT / words[1]
        assert script.is_file(), words[1]
        if words[2:] or "argparse" in script.read_text():
            parse_only(script, words[2:], folder, monkeypatch)


def run_bash(words, folder, monkeypatch):
    script = ROOT / words[1]
    assert script.is_file()
    if script.name == "gpu_report.sh":
        parse_only(ROOT / "benchmarks" / "gpu_report.py", words[2:], folder, monkeypatch)
    else:
        assert not words[2:], "options that are not tried"


def run_recipe(recipe, options, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if options == ["--help"]:
        with pytest.raises(SystemExit) as done:
            recipe.main(options)
        assert done.value.code == 0
        return
    output = folder / "run"
    own = ["--dataset_name", "problems", "--eval_every", "0"] if recipe is gsm8k else []
    recipe.main([*options, *SMALL, *own, "--output_dir", str(output)])
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 1


def run_launch(words, folder, monkeypatch):
    launch = launch_command_parser().parse_args(words[2:])
    monkeypatch.chdir(folder)
    if launch.config_file is not None:
        assert yaml.safe_load(Path(launch.config_file).read_text())["num_processes"] >= 1
    name = launch.training_script.removesuffix(".py").replace("/", ".").removeprefix("proma_trl.")
    recipe = {"recipes.gsm8k": gsm8k, "recipes.train": train}[name]
    assert bool(launch.module) == launch.training_script.startswith("proma_trl.")
    run_recipe(recipe, launch.training_script_args, folder, monkeypatch)


def run_check(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = ["policy" if "/" in word or word == "MODEL" else word for word in words[2:]]
    assert check.main(options) == 0


def run_train(words, folder, monkeypatch):
    def launched(launch):
        assert launch.module and launch.training_script == train.__name__
        run_recipe(train, launch.training_script_args, folder, monkeypatch)

    monkeypatch.chdir(folder)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched)
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    cli.main(["policy" if word == "Qwen/Qwen3-0.6B" else word for word in words[1:]])


def run_compare(words, folder, monkeypatch):
    """All but the runs, and the warm start of the policy."""
    planned = planned_runs(monkeypatch)
    monkeypatch.setattr(training, "check_model", lambda *_: None)  # the model need not be within reach
    monkeypatch.setattr(sys, "argv", ["proma-trl"])
    monkeypatch.chdir(folder)
    cli.main([*words[1:], "--output_dir", str(folder / "compare")])
    assert planned


def run_frontier(options, folder, monkeypatch):
    """All but the runs, and the warm start of the policy."""
    planned = []

    def plan_all(plan, records, *rest):
        planned.extend([*records, *plan.missing(score_all(records))])

    monkeypatch.setattr(frontier, "execute_all", plan_all)
    monkeypatch.setattr(frontier, "write_task", lambda folder, **kwargs: (folder / "warm_start").mkdir(parents=True))
    given = dict(pairwise(options))
    # As if the initial policy were that of the known runs, and without a trace in this process
    known = ROOT / given["--known_runs"] if "--known_runs" in given else None
    policy = json.loads((known.parent / "settings.json").read_text())["policy"] if known else ""
    monkeypatch.setattr(frontier, "fingerprint", lambda _: policy)
    monkeypatch.setattr(frontier, "INSTRUCTIONS", {})
    if "--pretrained" in given:
        options = [str(folder) if word == given["--pretrained"] else word for word in options]
    # From the repository's folder, whose results it may start from, and with its own in another one
    monkeypatch.chdir(ROOT)
    frontier.main([*options, "--output_dir", tempfile.mkdtemp(dir=folder)])
    assert planned


def run_demo(words, folder, monkeypatch):
    parse_only(Path(demo.__file__), words[2:], folder, monkeypatch)


def run_proma_trl(words, folder, monkeypatch):
    if words[1:] == ["--version"]:
        with pytest.raises(SystemExit):
            cli.main(words[1:])
        return
    {"train": run_train, "compare": run_compare, "check": run_check, "demo": run_demo}[words[1]](
        words, folder, monkeypatch
    )


def run_vllm(words, folder, monkeypatch):
    """The tests with vLLM start a server with these options on a CPU, all but those for GPUs."""
    tried = (ROOT / "tests" / "engine" / "test_server.py").read_text()
    for word in words:
        if word.startswith("--") and word not in ("--tensor-parallel-size", "--weight-transfer-config"):
            assert f'"{word}"' in tried, word


def run_trackio(words, folder, monkeypatch):
    (command,) = distribution("trackio").entry_points.select(group="console_scripts", name="trackio")
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit) as done:
        command.load()()
    assert done.value.code == 0


HANDLERS = {
    "accelerate": run_launch,
    "bash": run_bash,
    "make": run_make,
    "pip": run_pip,
    "proma-trl": run_proma_trl,
    "python": run_python,
    "trackio": run_trackio,
    "vllm": run_vllm,
}


def test_commands_are_found():
    assert len(COMMANDS) > 40
    assert {words[0] for _, words in COMMANDS.values()} >= {"make", "pip", "python", "accelerate", "proma-trl"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, monkeypatch):
    page, words = COMMANDS[command]
    assert words[0] in HANDLERS, f"{page.relative_to(ROOT)} has a command that no test runs: {command}"
    HANDLERS[words[0]](words, folder, monkeypatch)
