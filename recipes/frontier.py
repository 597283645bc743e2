"""
The comparison of docs/protocol.md on the embedded task: what each algorithm reaches within a divergence from its
initial policy, every one with the learning rate that suits it, beside two controls.

    python recipes/frontier.py --output_dir runs/frontier
    python recipes/frontier.py --output_dir runs/frontier_smollm2 --pretrained path/to/SmolLM2-135M-Instruct

Every arm is tuned by itself: four learning rates with the tuning seeds; further rates as long as the best is at an
edge; then, at the best rate, other values of the arm's own parameter. The best setting is run with the test seeds.
Runs are those of recipes/gsm8k.py, a few at a time in processes that go on from one run to the next. A run that is
complete is a line of runs.jsonl, and is not made again: give the same command again to go on. Leaves the report of
recipes/frontier_report.py in the output folder, of the runs that are complete.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from safetensors import deserialize
from trl import TrlParser

from proma_trl.recipes.frontier_plan import PRETRAINED, PROTOCOL, QUICK, REGIMES, Plan, Run, read_run, read_runs
from proma_trl.recipes.frontier_report import write_report
from proma_trl.recipes.frontier_summary import score, score_all
from proma_trl.recipes.word_problems import write_task
from proma_trl.tools.curves import METRICS, read_curves

CONFIGS = Path(__file__).parent / "configs"
# Beside runs, what they have in common
SETTINGS = "settings.json"
# Those of CPUs with AVX2. Arithmetic with wider vectors rounds otherwise, and warm-starts another initial policy.
INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# What is kept of a run's log
LOGGED = {
    **METRICS,
    "final_accuracy": "eval_final_accuracy",
    "reward": "reward",
    "length_ratio": "control/length_ratio",
    "removed": "projection/norm_ratio",
    "masked": "dppo/masked_fraction",
    "clipped": "clip_ratio/region_mean",
    "update_overlap": "update/overlap",
    "update_tensor_overlap": "update/tensor_overlap",
    "update_last_tensor_overlap": "update/last_tensor_overlap",
}


@dataclass
class FrontierArguments:
    """What is to be compared."""

    output_dir: str = field(default="runs/frontier", metadata={"help": "Where runs and report are left."})
    quick: bool = field(
        default=False,
        metadata={
            "help": "A version for ten minutes, which shows how it works and settles nothing: four arms, two learning "
            "rates, one seed to tune and two to test, 16 steps."
        },
    )
    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "Compare on a pretrained model, SmolLM2-135M-Instruct on the Hugging Face Hub or in a local "
            "folder, which learns sums: recipes/sums.py in the place of the embedded task."
        },
    )
    jobs: int = field(default=2, metadata={"help": "Runs at a time, each with its share of the CPU cores."})
    minutes: float | None = field(
        default=None, metadata={"help": "After so many minutes, no other run begins. By default, all are made."}
    )
    known_runs: str | None = field(
        default=None,
        metadata={
            "help": "A runs.jsonl.gz of an earlier comparison with the same settings, whose runs are not made again. "
            "A settings.json beside it is checked."
        },
    )

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} has to be at least 1.")
        if self.quick and self.pretrained is not None:
            raise ValueError("quick=True is a version of the comparison on the embedded task. Leave out pretrained.")


def execute(run: Run, folder: Path, options: Sequence[str]) -> dict:
    """
    Trains in this process, with all output in `run.log`. Of what the run leaves, its logs are kept.

    `options` are those of all runs: the model, the data.

    Returns:
        `dict`: The record of the run: what it was, its curves by step, and how many seconds it took.
    """
    regime = REGIMES[run.regime]
    recipe = importlib.import_module(f"proma_trl.recipes.{regime.recipe}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    with _output_in(folder / "run.log"):
        config = ["--config", str(CONFIGS / regime.config), *regime.options.split()]
        recipe.main([*config, *options, *run.options(), "--output_dir", str(folder)])
        gc.collect()
    seconds = time.monotonic() - begin
    for path in folder.iterdir():
        if path.name not in ("run.log", "metrics.jsonl"):
            path.unlink()
    return {**asdict(run), "seconds": round(seconds, 1), "curves": read_record(folder)}


def read_record(folder: Path) -> dict[str, dict[str, float]]:
    """The curves of a run that are kept, by step, with six digits."""
    curves = read_curves(folder, LOGGED)
    return {
        name: {str(step): float(f"{value:.6g}") for step, value in curve.items()} for name, curve in curves.items()
    }


@contextlib.contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """Within the context, what this process prints goes to a file, whoever prints it."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, own in zip((1, 2), kept, strict=True):
                os.dup2(own, stream)
                os.close(own)


def settings_of(plan: Plan, options: Sequence[str]) -> dict:
    """What the plan's runs have in common, the initial policy aside."""
    configs = sorted({REGIMES[block.regime].config for block in plan.blocks})
    regimes = {Path(name).stem: yaml.safe_load((CONFIGS / name).read_text()) for name in configs}
    return {"options": list(options), **regimes}


def check_settings(folders: Sequence[Path], settings: Mapping) -> None:
    """
    Raises:
        ValueError: A folder holds runs with other settings.
    """
    for folder in folders:
        path = folder / SETTINGS
        found = json.loads(path.read_text()) if path.is_file() else settings
        others = ", ".join(name for name, value in settings.items() if found.get(name) != value)
        if others:
            raise ValueError(
                f"{folder} holds runs with other settings ({others}). Choose another folder, or remove that one."
            )


def execute_all(
    plan: Plan, records: dict[Run, dict], output: Path, jobs: int, options: Sequence[str], minutes: float | None
) -> None:
    """Makes the plan's runs, and adds each to `records` and to runs.jsonl when it is complete."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    context = multiprocessing.get_context("spawn")
    running: dict[Future, Run] = {}
    scores = score_all(records)
    path = output / "runs.jsonl"
    if path.is_file():  # without the half of a line that a killed process may have left
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, path.open("a") as file:
        while True:
            waiting = [run for run in plan.missing(scores) if run not in running.values()]
            while waiting and len(running) < jobs and time.monotonic() < end:
                run = waiting.pop(0)
                running[pool.submit(execute, run, output / run.name, options)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                line = json.dumps(future.result()) + "\n"
                file.write(line)
                file.flush()
                run, record = read_run(line)
                records[run], scores[run] = record, score(record["curves"], REGIMES[run.regime])
                print(
                    f"{len(records)} complete, {len(waiting) + len(running)} or more to come. {run.name}: score "
                    f"{scores[run]:.3f}, {record['seconds']:.0f} s",
                    flush=True,
                )


def fingerprint(policy: Path) -> str:
    """A hash of a saved policy's weights, of 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(policy.glob("*.safetensors")):
        weights = dict(deserialize(path.read_bytes()))
        for name in sorted(weights):
            found.update(name.encode() + weights[name]["data"])
    return found.hexdigest()[:16]


def embedded_task(folder: Path) -> list[str]:
    """Makes the embedded task where the folder does not have it. Returns the options that choose it."""
    if not (folder / "complete").is_file():
        print("Generating problems, and warm-starting a small policy with SFTTrainer.", flush=True)
        write_task(folder, seed=0, level="hard")
        (folder / "complete").touch()
    return ["--model_name_or_path", str(folder / "warm_start"), "--dataset_name", str(folder / "problems")]


def main(arguments: list[str]) -> None:
    """Parses the options, makes the runs that are missing, and writes the report."""
    parser = TrlParser(
        [FrontierArguments], description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    (args,) = parser.parse_args_and_config(arguments)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    plan = PRETRAINED if args.pretrained is not None else QUICK if args.quick else PROTOCOL
    options = ["--max_steps", "16"] if args.quick else []
    known = None if args.known_runs is None else Path(args.known_runs)
    folders = [output, *([known.parent] if known else [])]
    settings = settings_of(plan, options)
    # Before the task, which takes minutes to make
    check_settings(folders, settings)
    os.environ |= INSTRUCTIONS
    if args.pretrained is not None:
        source = ["--model_name_or_path", args.pretrained]
        policy = Path(args.pretrained)
    else:
        source = embedded_task(output / "task")
        policy = output / "task" / "warm_start"
    settings["policy"] = fingerprint(policy) if policy.is_dir() else args.pretrained
    check_settings(folders, settings)
    (output / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    records = read_runs(known) if known else {}
    if (output / "runs.jsonl").is_file():
        records |= read_runs(output / "runs.jsonl")
    execute_all(plan, records, output, args.jobs, [*source, *options], args.minutes)
    print(write_report(plan, records, output))


if __name__ == "__main__":
    main(sys.argv[1:])
