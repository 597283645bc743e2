"""
Everything that needs an NVIDIA GPU, in one report: tests, step time, memory, the model of both, and the recipe.

    bash scripts/gpu_report.sh
    bash scripts/gpu_report.sh --skip recipe
    bash scripts/gpu_report.sh --recipe-model models/Qwen3-0.6B --recipe-data data/gsm8k
    bash scripts/gpu_report.sh --dry-run

Each part has processes of its own, a log and a time limit. A part that fails does not stop the others: the report
says what failed and shows the end of the log. The report is one JSON and one Markdown file in `--output`, written anew
after each part. Logs and other files are in a folder beside it. Only the tests for two GPUs use more than one.

`--dry-run` runs all parts on a CPU, with tiny shapes, to try the report itself. Its figures mean nothing.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "triton", "vllm", "pytest", "proma-trl")
ALGORITHMS = ("proma", "proma_intra", "proma_both")
NAMES = ("environment", "tests", "tests_two_gpus", "step_time", "memory", "model", "lengths", "recipe")
# Microbatches of an optimizer step, measured and modelled
MICROBATCHES = 16

# Completions like GSM8K's
LENGTHS = "lognormal:180:0.6:1024"

LENGTHS_NOTE = (
    f"Rollouts with lengths of completions drawn from {LENGTHS}. Positions are those that the model runs on for each "
    "real token. Ratios are to GRPO, which is padded"
)

MODEL_NOTE = (
    "The model counts the same optimizer step, but scores all tokens of all completions. Measured completions end "
    "anywhere in their second half. Ratios are to GRPO"
)

# What the recipe's table shows, as far as the run has logged it
METRICS = (
    "reward",
    "reward_std",
    "entropy",
    "grad_norm",
    "completions/mean_length",
    "projection/norm_ratio",
    "projection/overlap",
    "step_time",
)

# Without vLLM, the keys and values of the paper's 1,024 sequences do not fit a GPU
SMALL_ROLLOUT = {
    "use_vllm": "false",
    "gradient_accumulation_steps": "4",
    "steps_per_generation": "8",
    "max_completion_length": "1024",
}

TAIL_LINES, TAIL_WIDTH = 30, 300


class NothingRanError(Exception):
    """All tests were skipped; the message says why."""


@dataclass(frozen=True)
class Command:
    """
    A process of a part.

    Args:
        arguments (`Sequence[str]`): What follows `python`.
        read (`Callable[[], Any]`, *optional*): Reads what the process has written. It also runs if the process fails,
            for what is there by then.
    """

    arguments: Sequence[str]
    read: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Part:
    """
    A part of the report.

    Args:
        name (`str`): Its name for `--skip` and for logs.
        title (`str`): Its name in the report.
        commands (`Sequence[Command]`): Its processes, one after the other.
        environment (`Mapping[str, str]`): Environment variables to add.
        minutes (`float`): Time limit of each process.
        skip (`str`, *optional*): Why the part does not run.
        note (`str`, *optional*): What a reader of the results has to know.
    """

    name: str
    title: str
    commands: Sequence[Command]
    environment: Mapping[str, str]
    minutes: float
    skip: str | None = None
    note: str | None = None


# Running


def log_tail(path: Path) -> list[str]:
    """The last lines of a log, without colours and with only the last state of progress bars."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", path.read_bytes().decode(errors="replace"))
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line[:TAIL_WIDTH] for line in lines if line][-TAIL_LINES:]


def run_process(arguments: Sequence[str], log: Path, environment: Mapping[str, str], minutes: float) -> str | None:
    """Runs `python` with the arguments, in the repository; returns what went wrong, or `None`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            return f"stopped after {minutes:g} minutes"
        finally:
            # Launchers leave ranks and engines behind that would keep the GPU's memory.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status < 0:
        return f"ended by signal {-status}"
    return f"exit status {status}" if status else None


def run_command(command: Command, log: Path, environment: Mapping[str, str], minutes: float) -> dict[str, Any]:
    """Runs a process of a part and reads its results."""
    start, result, status = time.monotonic(), None, "passed"
    reason = run_process(command.arguments, log, environment, minutes)
    if reason is not None:
        status = "failed"
    if command.read is not None:
        try:
            result = command.read()
        except NothingRanError as error:
            if status == "passed":
                status, reason = "skipped", str(error)
        except Exception as error:
            # A process that fails has a better reason than its missing results.
            if status == "passed":
                status, reason = "failed", f"its results cannot be read: {type(error).__name__}: {error}"
    return {
        "command": shlex.join(["python", *command.arguments]),
        "status": status,
        "reason": reason,
        "seconds": round(time.monotonic() - start, 1),
        "log_tail": log_tail(log) if status == "failed" else [],
        "result": result,
    }


def run_part(part: Part, folder: Path) -> dict[str, Any]:
    """Runs the processes of a part, unless it is skipped."""
    described = {"name": part.name, "title": part.title, "note": part.note, "commands": []}
    if part.skip is not None:
        return {**described, "status": "skipped", "reason": part.skip}
    for number, command in enumerate(part.commands, 1):
        log = folder / f"{part.name}_{number}.log"
        described["commands"].append(run_command(command, log, part.environment, part.minutes))
    statuses = {command["status"] for command in described["commands"]}
    status = next(status for status in ("failed", "passed", "skipped") if status in statuses)
    reasons = [command["reason"] for command in described["commands"] if command["status"] == status]
    return {**described, "status": status, "reason": "; ".join(filter(None, reasons)) or None}


def results(part: Mapping[str, Any]) -> list[Any]:
    """What the processes of a part have written."""
    return [command["result"] for command in part["commands"] if command["result"] is not None]


# Reading


def read_tests(path: Path) -> dict[str, Any]:
    """
    Counts of a JUnit file, and the first line of each failure.

    Raises:
        NothingRanError: If all tests were skipped.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = [], set()
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if wrong is not None:
            counts["failed"] += 1
            message = (wrong.get("message") or "").strip().split("\n")[0][:TAIL_WIDTH]
            failures.append({"test": case.get("name"), "message": message})
        elif skipped is not None:
            counts["skipped"] += 1
            reasons.add(skipped.get("message") or "no reason given")
        else:
            counts["passed"] += 1
    if counts["passed"] == counts["failed"] == 0:
        raise NothingRanError(f"all {counts['skipped']} tests were skipped: {'; '.join(sorted(reasons))}")
    return {**counts, "skip_reasons": sorted(reasons), "failures": failures}


def read_results(path: Path, fields: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    """These fields of each of a benchmark's results, and `more`, which is the same for all."""
    listed = json.loads(path.read_text())["results"]
    return [{**more, **{field: result[field] for field in fields}} for result in listed]


def read_recipe(path: Path) -> dict[str, Any]:
    """The first and the last logged step of `metrics.jsonl`, and means over all steps."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    logged = [record for record in records if "reward" in record]
    if not logged:
        raise ValueError(f"{path.name} has no step with a reward")

    def chosen(record: Mapping[str, Any]) -> dict[str, Any]:
        return {name: record[name] for name in ("step", *METRICS) if name in record}

    seconds = sum(record["step_time"] for record in logged)
    return {
        "steps": len(logged),
        "first": chosen(logged[0]),
        "last": chosen(logged[-1]),
        "mean_reward": sum(record["reward"] for record in logged) / len(logged),
        "seconds_per_step": seconds / len(logged),
        "tokens_per_second": logged[-1]["num_tokens"] / seconds,
    }


def data_sheet(name: str) -> str | None:
    """The data sheet of `roofline.py` for a GPU's name, or `None` if it has none for it."""
    # Other boards and slices of a GPU have other rates, and so has the memory of an A100 with 40 GB.
    if re.search(r"PCIe|NVL|MIG|40GB", name, re.IGNORECASE):
        return None
    found = re.search(r"\b(A100|H100|H200)\b", name, re.IGNORECASE)
    return found.group(1).lower() if found else None


def compare(modelled: Iterable[Mapping[str, Any]], measured: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Modelled beside measured ratios, for each shape and algorithm that both have.

    `off` is how much larger the modelled ratio is than the measured one, as a share of the latter.
    """
    found = {(row["length"], row["sequences"], row["algorithm"]): row for row in measured}
    rows = []
    for row in modelled:
        key = (row["length"], row["sequences"], row["algorithm"])
        if key not in found:
            continue
        rows.append(
            {
                "length": row["length"],
                "sequences": row["sequences"],
                "algorithm": row["algorithm"],
                "modelled_seconds": row["seconds"],
                "measured_seconds": found[key]["seconds"],
                "modelled_ratio": row["ratio"],
                "measured_ratio": found[key]["ratio"],
                "off": row["ratio"] / found[key]["ratio"] - 1,
            }
        )
    return rows


def output_of(*command: str) -> str | None:
    """What a program prints, or `None` if it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe() -> dict[str, Any]:
    """GPUs, driver, versions and commit. It runs in a process of its own, which may fail and keeps no GPU memory."""
    import torch

    from proma_trl.devices import default_memory_budget

    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = []
    for device in (torch.device("cuda", index) for index in range(torch.cuda.device_count())):
        properties = torch.cuda.get_device_properties(device)
        memory, budget = properties.total_memory / 2**30, default_memory_budget(device)
        gpus.append({"name": properties.name, "memory_gib": round(memory, 1), "budget_gib": round(budget, 2)})
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changes = output_of("git", "status", "--porcelain")
    return {
        "gpus": gpus,
        "driver": driver.split("\n")[0] if driver else None,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "clean": None if changes is None else not changes,
    }


def make_tiny_run(folder: Path) -> None:
    """A tiny random policy, a handful of problems, and settings for both: those of the recipe's tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.recipe import make_settings, write_config

    folder.mkdir()
    write_config(folder, make_settings(folder) | {"output_dir": str(folder.parent / "run")})


# What is run


def benchmark_commands(
    script: str, fields: Sequence[str], arguments: argparse.Namespace, folder: Path
) -> list[Command]:
    """A benchmark of whole steps, once for each shape."""
    commands = []
    for shape in arguments.shapes:
        length, sequences = shape.split(":")
        output = folder / f"{script}_{length}_{sequences}.json"
        options = [f"benchmarks/{script}.py", "--lengths", length, "--sequences", sequences]
        if arguments.dry_run:
            options += ["--hidden", "64", "--layers", "1", "--vocabulary", "256", "--device", "cpu"]
            options += ["--microbatches", "2", "--repeats", "1", "--algorithm", "proma", "proma_intra"]
        else:
            options += ["--bf16", "--model", "0.6B", "--algorithm", *ALGORITHMS]
            options += ["--microbatches", str(MICROBATCHES)]
        # The path is bound now: the next shape has another.
        commands.append(
            Command(
                [*options, "--output", str(output)],
                lambda output=output, k=int(sequences): read_results(output, fields, sequences=k),
            )
        )
    return commands


def lengths_commands(arguments: argparse.Namespace, folder: Path) -> list[Command]:
    """Steps and memory on rollouts, padded and in the trainer's layout, with no more than three models at a time."""
    if arguments.dry_run:
        options = ["--lengths", "lognormal:12:0.6:32", "--hidden", "64", "--layers", "1", "--vocabulary", "256"]
        options += ["--device", "cpu", "--sequences", "4", "--microbatches", "2", "--repeats", "1"]
    else:
        options = ["--lengths", LENGTHS, "--bf16", "--model", "0.6B", "--sequences", "8"]
        options += ["--microbatches", str(MICROBATCHES)]
    options += ["--layout", "padded", "ordered"]
    commands = []
    for script, field in (("step_time", "seconds"), ("memory", "peak_bytes")):
        fields = ("algorithm", "layout", field, "ratio", *(("positions",) if script == "step_time" else ()))
        for algorithm in ("proma", "proma_intra"):
            output = folder / f"lengths_{script}_{algorithm}.json"
            commands.append(
                Command(
                    [f"benchmarks/{script}.py", *options, "--algorithm", algorithm, "--output", str(output)],
                    lambda output=output, fields=fields: read_results(output, fields),
                )
            )
    return commands


def recipe_commands(arguments: argparse.Namespace, folder: Path) -> tuple[list[Command], str | None]:
    """The recipe, and what is not as in its file of settings."""
    launch = ["-m", "accelerate.commands.launch"]
    last = ["--max_steps", str(arguments.recipe_steps), "--eval_every", "0", "--logging_steps", "1"]
    last += ["--save_strategy", "no", "--report_to", "none", "--output_dir", str(folder / "run")]
    last += shlex.split(arguments.recipe_options)

    def read() -> dict[str, Any]:
        return read_recipe(folder / "run" / "metrics.jsonl")

    if arguments.dry_run:
        tiny = folder / "tiny"
        make = Command(["benchmarks/gpu_report.py", "--make-tiny-run", str(tiny)])
        options = ["--cpu", "--num_processes", "1", "recipes/gsm8k.py", "--config", str(tiny / "config.yaml")]
        return [make, Command([*launch, *options, *last], read)], "A tiny random policy"
    options = ["--config_file", "recipes/accelerate/single_gpu.yaml", "recipes/gsm8k.py"]
    options += ["--config", "recipes/configs/qwen3_0.6b_gsm8k.yaml"]
    note = None
    if arguments.recipe_model:
        options += ["--model_name_or_path", arguments.recipe_model]
    if arguments.recipe_data:
        options += ["--dataset_name", arguments.recipe_data]
    if importlib.util.find_spec("vllm") is None:
        options += [word for name, value in SMALL_ROLLOUT.items() for word in (f"--{name}", value)]
        note = "vLLM is not installed: the policy samples by itself, and rollouts are smaller than in the settings"
    return [Command([*launch, *options, *last], read)], note


def test_commands(path: str, folder: Path) -> list[Command]:
    """The tests of a file that need a GPU."""
    output = folder / f"{Path(path).stem}.xml"
    return [Command(["-m", "pytest", "-m", "gpu", path, f"--junitxml={output}"], lambda: read_tests(output))]


def first_gpu() -> str:
    """The first GPU that this process may use, as `CUDA_VISIBLE_DEVICES`."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def environment_part(arguments: argparse.Namespace, folder: Path) -> Part:
    """The part that describes the machine."""
    path = folder / "environment.json"
    command = Command(["benchmarks/gpu_report.py", "--describe", str(path)], lambda: json.loads(path.read_text()))
    variables = {"CUDA_VISIBLE_DEVICES": ""} if arguments.dry_run else {}
    return Part("environment", "Environment", [command], variables, 5)


def make_parts(arguments: argparse.Namespace, gpus: Sequence[Mapping[str, Any]] | None, folder: Path) -> list[Part]:
    """
    All parts but the first.

    Args:
        arguments (`argparse.Namespace`): The options.
        gpus (`Sequence[Mapping]`, *optional*): What the first part has found; `None` if it has failed.
        folder (`Path`): Where the parts write.
    """
    # With several GPUs in sight, transformers' Trainer would take them all.
    one = {"CUDA_VISIBLE_DEVICES": "" if arguments.dry_run else first_gpu()}
    two = {"CUDA_VISIBLE_DEVICES": ""} if arguments.dry_run else {}
    one_gpu = "one GPU" if gpus is not None and len(gpus) < 2 and not arguments.dry_run else None
    sheet, no_sheet = "h100", None
    if not arguments.dry_run:
        sheet = data_sheet(gpus[0]["name"]) if gpus else None
        no_sheet = None if sheet else f"no data sheet for {gpus[0]['name'] if gpus else 'an unknown GPU'}"
    model = folder / "model.json"
    roofline = ["benchmarks/roofline.py", "--device", str(sheet), "--model", "0.6B", "--grid", *arguments.shapes]
    roofline += ["--algorithm", "reinforce", *ALGORITHMS, "--microbatches", str(MICROBATCHES)]
    if arguments.dry_run:
        roofline += ["--layers", "1"]
    elif gpus:
        # The one that the measured steps have by default
        roofline += ["--budget", str(gpus[0]["budget_gib"])]
    roofline += ["--output", str(model)]
    shape_fields = ("length", "sequences", "algorithm", "seconds", "ratio")
    tests, tests_two = (
        test_commands(path, folder) for path in ("tests/trainer/test_cuda.py", "tests/backends/test_gpus.py")
    )
    steps = benchmark_commands("step_time", ("length", "algorithm", "seconds", "ratio"), arguments, folder)
    memory = benchmark_commands("memory", ("length", "algorithm", "peak_bytes", "ratio"), arguments, folder)
    modelled = [Command(roofline, lambda: read_results(model, shape_fields))]
    recipe, recipe_note = recipe_commands(arguments, folder)
    parts = [
        Part("tests", "Tests on one GPU", tests, one, 60),
        Part("tests_two_gpus", "Tests on two GPUs", tests_two, two, 60, one_gpu),
        Part("step_time", "Step time", steps, one, 60),
        Part("memory", "Peak memory", memory, one, 60),
        Part("model", "The model beside the measurement", modelled, one, 60, no_sheet, MODEL_NOTE),
        Part("lengths", "Real lengths", lengths_commands(arguments, folder), one, 60, None, LENGTHS_NOTE),
        Part("recipe", "The recipe", recipe, one, arguments.recipe_minutes, None, recipe_note),
    ]
    return [replace(part, skip="--skip") if part.name in arguments.skip else part for part in parts]


# Writing


def slug(name: str) -> str:
    """A GPU's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia")).strip("_")


def scrub(value: Any, places: Mapping[str, str]) -> Any:
    """The value with this machine's folders replaced, the longest first, in all strings."""
    if isinstance(value, str):
        for place in sorted(places, key=len, reverse=True):
            value = value.replace(place, places[place])
        return value
    if isinstance(value, Mapping):
        return {key: scrub(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item, places) for item in value]
    return value


def machine_places(arguments: argparse.Namespace) -> dict[str, str]:
    """This machine's folders, and what stands for them in the report."""
    places = {
        str(Path.home()): "~",
        f"{ROOT}/": "",
        sys.prefix: "<environment>",
        str(arguments.output): "<output>",
    }
    for path, name in ((arguments.recipe_model, "<model>"), (arguments.recipe_data, "<data>")):
        # A name on the Hub is no place, and belongs in the report.
        if path and Path(path).exists():
            places[path] = name
    return places


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table, as lines."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines] + [""]


def number(value: Any) -> str:
    """A number with four digits that count, and what else there is as it is."""
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def render_environment(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The machine's table."""
    (machine,) = found
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in machine["gpus"]]
    tree = {True: "clean", False: "with changes", None: "unknown"}[machine["clean"]]
    rows = [("GPUs", f"{len(gpus)}: {'; '.join(gpus)}" if gpus else "none")]
    rows += [(label, number(machine[name])) for label, name in (("Driver", "driver"), ("CUDA", "cuda"))]
    rows += [("Python", machine["python"]), *machine["versions"].items()]
    return markdown_table(["", ""], [*rows, ("Commit", f"{number(machine['commit'])}, {tree}")])


def render_tests(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Counts of tests, and those that failed."""
    lines = markdown_table(
        ["Passed", "Failed", "Skipped"],
        [[counts[name] for name in ("passed", "failed", "skipped")] for counts in found],
    )
    for counts in found:
        lines += [f"- skipped: {reason}" for reason in counts["skip_reasons"]]
        lines += [f"- failed: `{failure['test']}`: {failure['message']}" for failure in counts["failures"]]
    return [*lines, ""]


def render_beside_grpo(
    heading: str, show: Callable[[Mapping[str, Any]], str], found: Sequence[Sequence[Mapping[str, Any]]]
) -> list[str]:
    """A figure of each shape and algorithm, and its ratio to GRPO's."""
    rows = [
        [row["length"], row["sequences"], row["algorithm"], show(row), f"{row['ratio']:.3f}"]
        for shape in found
        for row in shape
    ]
    return markdown_table(["T", "k", "Algorithm", heading, "Ratio to GRPO"], rows)


def render_step_time(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Seconds of an optimizer step."""
    return render_beside_grpo("Seconds a step", lambda row: f"{row['seconds']:.3f}", found)


def render_memory(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Peak memory of processes of their own."""
    return render_beside_grpo("Peak, GiB", lambda row: f"{row['peak_bytes'] / 2**30:.2f}", found)


def render_lengths(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Seconds, positions and memory of steps on rollouts."""

    def shown(row: Mapping[str, Any]) -> str:
        if "seconds" in row:
            return f"{row['seconds']:.3f} s"
        return f"{row['peak_bytes'] / 2**30:.2f} GiB"

    rows = [
        [row["algorithm"], row["layout"], number(row.get("positions")), shown(row), f"{row['ratio']:.3f}"]
        for benchmark in found
        for row in benchmark
    ]
    return markdown_table(["Algorithm", "Layout", "Positions a token", "A step, or its peak", "Ratio to GRPO"], rows)


def render_recipe(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first and the last logged step."""
    lines = []
    for run in found:
        first, last = run["first"], run["last"]
        rows = [
            [name, number(first.get(name)), number(last.get(name))]
            for name in METRICS
            if name in first or name in last
        ]
        lines += markdown_table(["", f"Step {first['step']}", f"Step {last['step']}"], rows)
        lines += [
            f"{run['steps']} logged steps: {run['seconds_per_step']:.2f} seconds a step, "
            f"{run['tokens_per_second']:,.0f} tokens a second, mean reward {run['mean_reward']:.4f}.",
            "",
        ]
    return lines


def render_comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Modelled beside measured steps."""
    names = ("modelled_seconds", "measured_seconds", "modelled_ratio", "measured_ratio")
    return markdown_table(
        ["T", "k", "Algorithm", "Modelled s", "Measured s", "Modelled ratio", "Measured ratio", "The ratio is off by"],
        [
            [row["length"], row["sequences"], row["algorithm"]]
            + [f"{row[name]:.3f}" for name in names]
            + [f"{row['off']:+.1%}"]
            for row in rows
        ],
    )


RENDERERS: Mapping[str, Callable[[Sequence[Any]], list[str]]] = {
    "environment": render_environment,
    "tests": render_tests,
    "tests_two_gpus": render_tests,
    "step_time": render_step_time,
    "memory": render_memory,
    "lengths": render_lengths,
    "recipe": render_recipe,
}


def render(report: Mapping[str, Any]) -> str:
    """The report in Markdown: what failed, then each part, then the commands."""
    lines = [f"# PROMA on {report['gpu']}, {report['date']}", ""]
    if report["dry_run"]:
        lines += ["A dry run on a CPU with tiny shapes: the figures mean nothing.", ""]
    parts = report["parts"]
    lines += ["## Failures", ""]
    failed = [(part, command) for part in parts for command in part["commands"] if command["status"] == "failed"]
    if not failed:
        lines += ["None.", ""]
    for part, command in failed:
        lines += [f"**{part['title']}**: {command['reason']}", "", f"`{command['command']}`", ""]
        lines += ["```text", *command["log_tail"], "```", ""]
    left_out = [f"- {part['title']}: {part['reason']}" for part in parts if part["status"] == "skipped"]
    if left_out:
        lines += ["## Skipped", "", *left_out, ""]
    for part in parts:
        found = results(part)
        if not found:
            continue
        lines += [f"## {part['title']}", ""]
        if part["note"]:
            lines += [f"{part['note']}.", ""]
        if part["name"] == "model":
            lines += render_comparison(report["comparison"])
        else:
            lines += RENDERERS[part["name"]](found)
    lines += ["## Commands", ""]
    commands = [
        (command["command"], command["status"], command["seconds"]) for p in parts for command in p["commands"]
    ]
    lines += markdown_table(
        ["Command", "", "Seconds"], [(f"`{command}`", status, seconds) for command, status, seconds in commands]
    )
    return "\n".join(lines).rstrip() + "\n"


def make_report(arguments: argparse.Namespace, parts: Sequence[Mapping[str, Any]], gpu: str, date: str) -> dict:
    """The report, without this machine's folders."""
    by_name = {part["name"]: [row for shape in results(part) for row in shape] for part in parts}
    comparison = compare(by_name.get("model", []), by_name.get("step_time", []))
    report = {"date": date, "dry_run": arguments.dry_run, "gpu": gpu, "parts": list(parts), "comparison": comparison}
    return scrub(report, machine_places(arguments))


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Writes JSON and Markdown; returns the path of the latter."""
    path = folder / f"gpu_report_{slug(report['gpu'])}_{report['date']}.md"
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    path.write_text(render(report))
    return path


def outcome(part: Mapping[str, Any]) -> str:
    """How a part ended, in a line."""
    return f"{part['title']}: {part['status']}" + (f", {part['reason']}" if part["reason"] else "")


def run_report(arguments: argparse.Namespace) -> int:
    """Runs all parts and writes the report after each; returns the exit status."""
    work = arguments.output / "gpu_report_files"
    # What an earlier run has left would be read as this one's results.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    date = datetime.date.today().isoformat()
    done = [run_part(environment_part(arguments, work), work)]
    print(f"[1/{len(NAMES)}] {outcome(done[0])}", flush=True)
    machine = results(done[0])
    gpus = machine[0]["gpus"] if machine else None
    if gpus == [] and not arguments.dry_run:
        print("PyTorch finds no CUDA device. Try the report itself with --dry-run.", file=sys.stderr)
        return 2
    gpu = "CPU" if arguments.dry_run else gpus[0]["name"] if gpus else "unknown GPU"
    for part in make_parts(arguments, gpus, work):
        done.append(run_part(part, work))
        path = write_report(make_report(arguments, done, gpu, date), arguments.output)
        print(f"[{len(done)}/{len(NAMES)}] {outcome(done[-1])}", flush=True)
    print(path.read_text())
    print(f"Written: {path} and {path.with_suffix('.json').name}; logs in {work}")
    return int(any(part["status"] == "failed" for part in done))


def shape(text: str) -> str:
    """A shape T:k, checked."""
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not tokens:sequences, as in 512:8")
    return text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_report", help="folder of the report")
    parser.add_argument("--skip", nargs="+", default=[], choices=NAMES[1:], help="parts to leave out")
    parser.add_argument("--dry-run", action="store_true", help="run all parts on a CPU with tiny shapes")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="T:k", help="tokens and sequences (512:8 2048:4)")
    parser.add_argument("--recipe-model", help="a folder with Qwen3-0.6B, for machines without network")
    parser.add_argument("--recipe-data", help="a folder with GSM8K, for machines without network")
    parser.add_argument("--recipe-steps", type=int, help="optimizer steps (20)")
    parser.add_argument("--recipe-minutes", type=float, default=120, help="time limit of the recipe")
    parser.add_argument("--recipe-options", default="", help="more options for the recipe, in one string")
    parser.add_argument("--describe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-tiny-run", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.output = parsed.output.resolve()
    for name in ("recipe_model", "recipe_data"):
        value = getattr(parsed, name)
        # The recipe runs in the repository. What is no path is a name on the Hub.
        if value and Path(value).exists():
            setattr(parsed, name, str(Path(value).resolve()))
    parsed.shapes = parsed.shapes or (["32:2"] if parsed.dry_run else ["512:8", "2048:4"])
    parsed.recipe_steps = parsed.recipe_steps or (2 if parsed.dry_run else 20)
    return parsed


def main() -> None:
    arguments = parse()
    if arguments.describe is not None:
        arguments.describe.write_text(json.dumps(describe(), indent=2) + "\n")
    elif arguments.make_tiny_run is not None:
        make_tiny_run(arguments.make_tiny_run)
    else:
        sys.exit(run_report(arguments))


if __name__ == "__main__":
    main()
