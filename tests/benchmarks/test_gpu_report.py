"""The report for GPUs: what it runs, reads and writes, and the whole of it on a CPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.recipe import ROOT

from proma_trl.recipes import gsm8k as recipe
from proma_trl.recipes.training import make_parser

sys.path.insert(0, str(ROOT / "benchmarks"))
import common
import gpu_report
import rollouts
from gpu_report import Command, NothingRanError, Part

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.1, "budget_gib": 9.89}


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_data_sheet(name, sheet):
    assert gpu_report.data_sheet(name) == sheet


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H100 80GB HBM3", "h100_80gb_hbm3"), ("NVIDIA A100-SXM4-80GB", "a100_sxm4_80gb")]
)
def test_slug(name, slug):
    assert gpu_report.slug(name) == slug


# Reading


def junit(path, *cases):
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


SKIPPED = '<testcase name="c"><skipped message="needs a CUDA device"/></testcase>'


def test_tests_are_counted(tmp_path):
    failed = '<testcase name="b[1]"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>'
    error = '<testcase name="d"><error message="no fixture">trace</error></testcase>'
    path = junit(tmp_path / "junit.xml", '<testcase name="a"/>', failed, SKIPPED, error, '<testcase name="e"/>')
    assert gpu_report.read_tests(path) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "skip_reasons": ["needs a CUDA device"],
        "failures": [{"test": "b[1]", "message": "assert 1 == 2"}, {"test": "d", "message": "no fixture"}],
    }


def test_tests_that_are_all_skipped_have_not_passed(tmp_path):
    with pytest.raises(NothingRanError, match="all 2 tests were skipped: needs a CUDA device"):
        gpu_report.read_tests(junit(tmp_path / "junit.xml", SKIPPED, SKIPPED))


def write_metrics(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_recipe(tmp_path):
    steps = [
        {"step": 1, "reward": 0.25, "entropy": 2.0, "step_time": 3.0, "num_tokens": 100.0, "loss": 0.5},
        {
            "step": 2,
            "reward": 0.5,
            "entropy": 1.5,
            "step_time": 1.0,
            "num_tokens": 100.0,
            "projection/norm_ratio": 0.9,
        },
        {"step": 3, "reward": 0.75, "step_time": 4.0, "num_tokens": 400.0, "projection/norm_ratio": None},
    ]
    path = write_metrics(
        tmp_path / "metrics.jsonl", {"step": 0, "eval_accuracy": 0.0}, *steps, {"step": 3, "train_runtime": 9.0}
    )
    run = gpu_report.read_recipe(path)
    assert run == {
        "steps": 3,
        "first": {"step": 1, "reward": 0.25, "entropy": 2.0, "step_time": 3.0},
        "last": {"step": 3, "reward": 0.75, "step_time": 4.0, "projection/norm_ratio": None},
        "mean_reward": 0.5,
        "seconds_per_step": 8 / 3,
        "tokens_per_second": 50.0,
    }
    rendered = "\n".join(gpu_report.render_recipe([run]))
    assert "|  | Step 1 | Step 3 |" in rendered
    assert "| reward | 0.25 | 0.75 |" in rendered and "| entropy | 2 | – |" in rendered
    assert "2.67 seconds a step, 50 tokens a second, mean reward 0.5000" in rendered


def test_a_recipe_without_a_step(tmp_path):
    with pytest.raises(ValueError, match="no step with a reward"):
        gpu_report.read_recipe(write_metrics(tmp_path / "metrics.jsonl", {"step": 0, "eval_accuracy": 0.0}))


def test_comparison():
    def row(length, algorithm, seconds, ratio):
        return {"length": length, "sequences": 8, "algorithm": algorithm, "seconds": seconds, "ratio": ratio}

    modelled = [row(512, "reinforce", 1.0, 1.0), row(512, "proma", 3.0, 1.5), row(2048, "proma", 4.0, 9.0)]
    measured = [row(512, "grpo", 3.0, 1.0), row(512, "proma", 4.0, 1.2), {**row(2048, "proma", 5, 9), "sequences": 4}]
    (found,) = gpu_report.compare(modelled, measured)
    assert found["off"] == pytest.approx(0.25)
    assert (found["length"], found["sequences"], found["algorithm"]) == (512, 8, "proma")
    rendered = gpu_report.render_comparison([found])
    assert "| 512 | 8 | proma | 3.000 | 4.000 | 1.500 | 1.200 | +25.0% |" in rendered


def test_each_shape_has_results_of_its_own(tmp_path):
    arguments = gpu_report.parse(["--shapes", "32:2", "64:4"])
    commands = gpu_report.benchmark_commands("step_time", ("length", "ratio"), arguments, tmp_path)
    for command, length in zip(commands, (32, 64), strict=True):
        path = command.arguments[command.arguments.index("--output") + 1]
        results = [{"length": length, "ratio": 1.5, "more": None}]
        (tmp_path / path).write_text(json.dumps({"settings": {}, "results": results}))
    found = [command.read() for command in commands]
    assert found == [[{"sequences": 2, "length": 32, "ratio": 1.5}], [{"sequences": 4, "length": 64, "ratio": 1.5}]]


def test_log_tail(tmp_path):
    path = tmp_path / "log"
    path.write_text("first\n" + "\x1b[31mred\x1b[0m\n" * 40 + "10%\r50%\r100%\n\nlast " + "x" * 400)
    tail = gpu_report.log_tail(path)
    assert len(tail) == gpu_report.TAIL_LINES and tail[0] == "red" and tail[-2] == "100%"
    assert "50%" not in tail
    assert tail[-1].startswith("last x") and len(tail[-1]) == gpu_report.TAIL_WIDTH


def test_this_machines_folders_are_left_out():
    places = {"/home/ann": "~", "/home/ann/repository/": "", "/home/ann/repository/.venv": "<environment>"}
    value = {"log": ["/home/ann/repository/a.py", "/home/ann/repository/.venv/b.py"], "n": 1, "file": "/home/ann/c"}
    assert gpu_report.scrub(value, places) == {"log": ["a.py", "<environment>/b.py"], "n": 1, "file": "~/c"}


# Running


def python(code, read=None):
    return Command(["-c", code], read)


def make_part(*commands, minutes=1.0, **settings):
    return Part("step_time", "Step time", commands, settings.pop("environment", {}), minutes, **settings)


def test_a_process_that_fails(tmp_path):
    code = "print('before'); import sys; sys.exit(3)"
    part = gpu_report.run_part(make_part(python(code, lambda: ["partial"]), python("", lambda: ["whole"])), tmp_path)
    assert (part["status"], part["reason"]) == ("failed", "exit status 3")
    first, second = part["commands"]
    assert (first["status"], first["log_tail"], first["result"]) == ("failed", ["before"], ["partial"])
    assert (second["status"], second["log_tail"], second["result"]) == ("passed", [], ["whole"])
    assert (tmp_path / "step_time_1.log").read_text() == "before\n"


def test_results_that_are_missing(tmp_path):
    missing = tmp_path / "missing.json"
    part = gpu_report.run_part(make_part(python("", lambda: json.loads(missing.read_text()))), tmp_path)
    assert part["status"] == "failed"
    assert part["reason"].startswith("its results cannot be read: FileNotFoundError")
    failing = make_part(python("raise SystemExit(1)", lambda: json.loads(missing.read_text())))
    assert gpu_report.run_part(failing, tmp_path)["reason"] == "exit status 1"


def test_tests_that_are_all_skipped(tmp_path):
    path = junit(tmp_path / "junit.xml", SKIPPED)
    part = gpu_report.run_part(make_part(python("", lambda: gpu_report.read_tests(path))), tmp_path)
    assert (part["status"], part["commands"][0]["log_tail"]) == ("skipped", [])
    assert part["reason"] == "all 1 tests were skipped: needs a CUDA device"


def test_time_limit(tmp_path):
    """What the process has started ends with it."""
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    part = gpu_report.run_part(make_part(python(code), minutes=0.02), tmp_path)
    assert (part["status"], part["reason"]) == ("failed", "stopped after 0.02 minutes")
    assert time.monotonic() - start < 30
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_environment_variables(tmp_path):
    part = make_part(python("import os; raise SystemExit(os.environ['NAME'])"), environment={"NAME": "value"})
    assert gpu_report.run_part(part, tmp_path)["commands"][0]["log_tail"] == ["value"]


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    rows = [{"length": 512, "sequences": 8, "algorithm": "proma", "seconds": 2.0, "ratio": 1.25}]
    secret = f"open({str(tmp_path / 'data')!r})"
    parts = [
        replace(make_part(python(secret)), name="tests", title="Tests on one GPU"),
        make_part(python("", lambda: rows)),
        replace(make_part(skip="no data sheet for NVIDIA L4"), name="model", title="The model"),
    ]
    monkeypatch.setattr(gpu_report, "make_parts", lambda *_: parts)
    arguments = gpu_report.parse(["--dry-run", "--output", str(tmp_path)])
    assert gpu_report.run_report(arguments) == 1
    (path,) = tmp_path.glob("gpu_report_cpu_*.json")
    report = json.loads(path.read_text())
    found = {part["name"]: part["status"] for part in report["parts"]}
    assert found == {"environment": "passed", "tests": "failed", "step_time": "passed", "model": "skipped"}
    assert report["parts"][0]["commands"][0]["result"]["versions"]["proma-trl"]

    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    failures, rest = text.split("## Skipped")
    assert "**Tests on one GPU**: exit status 1" in failures and "FileNotFoundError" in failures
    assert "- The model: no data sheet for NVIDIA L4" in rest
    assert "| 512 | 8 | proma | 2.000 | 1.250 |" in rest
    assert str(tmp_path) not in text + path.read_text()


def test_no_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_report.run_report(gpu_report.parse(["--output", str(tmp_path)])) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


# What is run


def parts_for(gpus, *options, folder=ROOT / "runs"):
    return {part.name: part for part in gpu_report.make_parts(gpu_report.parse(options), gpus, folder)}


def test_parts_of_one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    parts = parts_for([H100], "--skip", "recipe", "memory")
    assert tuple(parts) == gpu_report.NAMES[1:]
    skipped = {name: part.skip for name, part in parts.items() if part.skip}
    assert skipped == {"tests_two_gpus": "one GPU", "memory": "--skip", "recipe": "--skip"}
    assert parts["step_time"].environment == {"CUDA_VISIBLE_DEVICES": "3"}
    (model,) = parts["model"].commands
    options = dict(zip(model.arguments, model.arguments[1:], strict=False))
    assert (options["--device"], options["--budget"], options["--microbatches"]) == ("h100", "9.89", "16")
    assert (ROOT / model.arguments[0]).exists()


def test_parts_of_other_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = parts_for([{"name": "NVIDIA L4", "memory_gib": 22.0, "budget_gib": 2.75}] * 2)
    assert two["tests_two_gpus"].skip is None and two["tests_two_gpus"].environment == {}
    assert two["tests"].environment == {"CUDA_VISIBLE_DEVICES": "0"}
    assert two["model"].skip == "no data sheet for NVIDIA L4"
    unknown = parts_for(None)
    assert unknown["tests_two_gpus"].skip is None
    assert unknown["model"].skip == "no data sheet for an unknown GPU"


@pytest.mark.parametrize("name", ["step_time", "memory"])
def test_commands_of_benchmarks(name):
    commands = parts_for([H100])[name].commands
    found = []
    for command in commands:
        script, *options = command.arguments
        assert script == f"benchmarks/{name}.py" and (ROOT / script).exists()
        arguments = common.make_parser("").parse_args(options)
        assert arguments.bf16 and arguments.model == "0.6B" and arguments.hidden == 1024
        assert arguments.microbatches == 16 and arguments.algorithm == ["proma", "proma_intra", "proma_both"]
        found.append((arguments.lengths, arguments.sequences))
    assert found == [([512], 8), ([2048], 4)]
    assert commands[0].arguments[-1] != commands[1].arguments[-1]


def test_commands_on_rollouts():
    """GPUs hold GRPO's model and two more."""
    commands = parts_for([H100])["lengths"].commands
    found = []
    for command in commands:
        script, *options = command.arguments
        arguments = rollouts.make_rollout_parser("").parse_args(options)
        assert str(arguments.lengths[0]) == gpu_report.LENGTHS and arguments.layout == ["padded", "ordered"]
        assert arguments.bf16 and arguments.model == "0.6B" and arguments.microbatches == 16
        found.append((script, *arguments.algorithm))
    assert found == [
        ("benchmarks/step_time.py", "proma"),
        ("benchmarks/step_time.py", "proma_intra"),
        ("benchmarks/memory.py", "proma"),
        ("benchmarks/memory.py", "proma_intra"),
    ]
    assert len({command.arguments[-1] for command in commands}) == 4


def test_results_on_rollouts(tmp_path):
    step, memory = (gpu_report.lengths_commands(gpu_report.parse([]), tmp_path)[i] for i in (0, 2))
    row = {"length": gpu_report.LENGTHS, "algorithm": "proma", "layout": "ordered", "ratio": 0.25}
    Path(step.arguments[-1]).write_text(json.dumps({"results": [{**row, "seconds": 1.5, "positions": 1.21}]}))
    Path(memory.arguments[-1]).write_text(json.dumps({"results": [{**row, "peak_bytes": 2**30}]}))
    rendered = "\n".join(gpu_report.render_lengths([step.read(), memory.read()]))
    assert "| proma | ordered | 1.21 | 1.500 s | 0.250 |" in rendered
    assert "| proma | ordered | – | 1.00 GiB | 0.250 |" in rendered


@pytest.mark.parametrize("has_vllm", [False, True])
def test_command_of_the_recipe(has_vllm, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: has_vllm or None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    part = parts_for(
        [H100], "--recipe-model", "policy", "--recipe-data", "a/name", "--recipe-options", "--seed 3", folder=tmp_path
    )["recipe"]
    (command,) = part.commands
    start = command.arguments.index("recipes/gsm8k.py")
    launcher = command.arguments[:start]
    assert launcher[:3] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert (ROOT / launcher[3]).exists()
    monkeypatch.chdir(ROOT)
    options = [*command.arguments[start + 1 :], "--use_cpu"]
    args, training_args, model_args, *_ = make_parser(recipe.GSM8KArguments, "proma").parse_args_and_config(options)
    assert (training_args.max_steps, args.eval_every, training_args.seed) == (20, 0, 3)
    assert (model_args.model_name_or_path, args.dataset_name) == (str(tmp_path / "policy"), "a/name")
    assert training_args.output_dir == str(tmp_path / "run")
    assert training_args.use_vllm == has_vllm
    assert training_args.steps_per_generation == (128 if has_vllm else 8)
    assert (part.note is None) == has_vllm


@pytest.mark.parametrize("shape", ["512", "0:8", "512:8:1"])
def test_shapes_are_checked(shape, capsys):
    with pytest.raises(SystemExit):
        gpu_report.parse(["--shapes", shape])
    assert "is not tokens:sequences" in capsys.readouterr().err


# All of it


def run_script(folder, *options, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_report.sh"), *options],
        cwd=folder,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_dry_run(tmp_path):
    run = run_script(tmp_path, "--dry-run", "--output", "reports")
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (tmp_path / "reports").glob("gpu_report_cpu_*.json")
    report = json.loads(path.read_text())
    statuses = {part["name"]: part["status"] for part in report["parts"]}
    assert tuple(statuses) == gpu_report.NAMES
    assert {name for name, status in statuses.items() if status == "skipped"} == {"tests", "tests_two_gpus"}
    assert set(statuses.values()) == {"passed", "skipped"}

    parts = {part["name"]: gpu_report.results(part) for part in report["parts"]}
    ((*steps,),) = parts["step_time"]
    assert [row["algorithm"] for row in steps] == ["grpo", "proma", "proma_intra"]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in steps)
    ((*peaks,),) = parts["memory"]
    assert [row["algorithm"] for row in peaks] == ["grpo", "proma", "proma_intra"]
    assert all(row["peak_bytes"] > 0 for row in peaks)
    assert [row["algorithm"] for row in report["comparison"]] == ["grpo", "proma", "proma_intra"]
    assert {row["algorithm"] for shape in parts["lengths"] for row in shape} == {"grpo", "proma", "proma_intra"}
    (trained,) = parts["recipe"]
    assert (trained["first"]["step"], trained["last"]["step"]) == (1, 2)
    assert all(0 < trained[step]["projection/norm_ratio"] <= 1 for step in ("first", "last"))
    assert trained["tokens_per_second"] > 0

    text = path.with_suffix(".md").read_text()
    assert "## Failures\n\nNone." in text and "A dry run on a CPU" in text
    assert "- Tests on one GPU: all " in text and "needs two CUDA devices" in text
    for title in (
        "Environment",
        "Step time",
        "Peak memory",
        "The model beside the measurement",
        "Real lengths",
        "The recipe",
    ):
        assert f"## {title}\n" in text
    for place in (str(tmp_path), str(ROOT), sys.prefix):
        assert place not in text + path.read_text()


@pytest.mark.slow
def test_the_script_says_what_is_missing(tmp_path):
    run = run_script(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 1 and "finds no CUDA device" in run.stderr and "--force-reinstall torch==" in run.stderr
    run = run_script(tmp_path, PYTHON=str(tmp_path / "python"))
    assert run.returncode == 1 and "cannot import all that the report needs" in run.stderr
    assert not list(tmp_path.iterdir())
