"""
The comparison of docs/protocol.md on the embedded task: what each algorithm reaches within a divergence from its
initial policy, every one with the learning rate that suits it, beside two controls.

    python recipes/frontier.py --output_dir runs/frontier

Every arm is tuned by itself: four learning rates with the tuning seeds; further rates as long as the best is at an
edge; then, at the best rate, other values of the arm's own parameter. The best setting is run with the test seeds.
Runs are those of recipes/gsm8k.py, a few at a time in processes that go on from one run to the next. A run that is
complete is a line of runs.jsonl, and is not made again: give the same command again to go on. Leaves the report of
recipes/frontier_report.py in the output folder, of the runs that are complete.
"""

import contextlib
import gc
import gzip
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from trl import TrlParser

from proma_trl.recipes.word_problems import write_task
from proma_trl.tools.frontiers import frontier_score

CONFIGS = Path(__file__).parent / "configs"
BUDGETS = (0.005, 0.01, 0.02)  # nats per token from the initial policy
TUNING_SEEDS, TEST_SEEDS = (0, 1), tuple(range(100, 110))
FIRST_RATES = (-20, -18, -16, -14)  # in quarters of a decade: 1e-5, 3.2e-5, 1e-4, 3.2e-4
SUMMARIES = {
    "eval_accuracy": "eval_accuracy",
    "global_kl": "kl/global",
    "local_kl": "kl/local",
    "entropy": "entropy",
    "reward": "reward",
    "length_ratio": "control/length_ratio",
    "removed": "projection/norm_ratio",
    "masked": "dppo/masked_fraction",
    "clipped": "clip_ratio/region_mean",
}


@dataclass(frozen=True)
class Arm:
    """
    An algorithm, and the parameter of its own that is tuned beside the learning rate.

    Attributes:
        options (`str`): Options of recipes/gsm8k.py.
        parameter (`str`, *optional*): An option. Without one, the rates halfway to the best's neighbours are tried.
        values (`tuple`): Values of the parameter: the one with which rates are tuned, then the others.
    """

    options: str
    parameter: str | None = None
    values: tuple[str | float, ...] = ()


ARMS = {
    "proma": Arm("--algorithm proma", "--projection_bound", (0.5, 0.25, 1.0)),
    "proma_intra": Arm("--algorithm proma_intra", "--intra_dim", (10, 5, 20)),
    "proma_both": Arm("--algorithm proma_both", "--intra_dim", (10, 5, 20)),
    "isopo": Arm("--algorithm isopo", "--isopo", ("natural", "norm", "fisher")),
    "reinforce": Arm("--algorithm reinforce"),
    "grpo": Arm("--algorithm grpo", "--epsilon", (0.2, 0.1, 0.05)),
    "grpo_kl": Arm("--algorithm grpo", "--beta", (0.04, 0.1, 0.01)),
    "dppo": Arm("--algorithm dppo", "--divergence_threshold", (0.15, 0.05, 0.02)),
    "proma_random": Arm("--algorithm proma_random", "--projection_bound", (0.5, 0.25, 1.0)),
    "reinforce_matched": Arm("--algorithm reinforce_matched", "--projection_bound", (0.5, 0.25, 1.0)),
}

# In order of importance: a block is tuned and tested before the next one begins
MAIN = ("proma", "reinforce", "reinforce_matched", "proma_random", "proma_intra", "grpo")
BLOCKS = (
    ("on_policy", MAIN),
    ("stale", ("proma", "reinforce", "reinforce_matched", "proma_intra", "grpo", "dppo")),
    ("on_policy", ("dppo", "isopo", "grpo_kl", "proma_both")),
)
QUICK_BLOCKS = (("on_policy", ("proma", "reinforce", "reinforce_matched", "proma_random")),)


@dataclass(frozen=True)
class Run:
    """A run: an arm with a learning rate (in quarters of a decade), the place of its parameter's value, and a seed."""

    regime: str
    arm: str
    rate: int
    value: int
    seed: int

    @property
    def learning_rate(self) -> float:
        """With two digits."""
        return float(f"{10 ** (self.rate / 4):.1e}")

    @property
    def name(self) -> str:
        """Of its folder."""
        arm = ARMS[self.arm]
        own = f"_{arm.parameter.removeprefix('--')}_{arm.values[self.value]}" if arm.parameter else ""
        return f"{self.regime}/{self.arm}_lr_{self.learning_rate:g}{own}_seed_{self.seed}"

    def options(self) -> list[str]:
        """Those of recipes/gsm8k.py in which it differs from others of its regime."""
        arm = ARMS[self.arm]
        own = [arm.parameter, str(arm.values[self.value])] if arm.parameter else []
        return [*arm.options.split(), "--learning_rate", f"{self.learning_rate:g}", *own, "--seed", str(self.seed)]


@dataclass(frozen=True)
class Plan:
    """
    Which runs a comparison makes, as a function of what runs have scored.

    Attributes:
        blocks (`Sequence`): Pairs of a regime and its arms, in order.
        tuning_seeds (`Sequence[int]`), test_seeds (`Sequence[int]`): Seeds.
        rates (`Sequence[int]`): The first learning rates, in quarters of a decade, two apart.
        extends (`bool`): Whether edges are extended and parameters tuned.
    """

    blocks: Sequence[tuple[str, Sequence[str]]] = BLOCKS
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    test_seeds: Sequence[int] = TEST_SEEDS
    rates: Sequence[int] = FIRST_RATES
    extends: bool = True

    def missing(self, scores: Mapping[Run, float]) -> list[Run]:
        """The runs that can be made now, the most important first; empty when all have been made."""
        runs = []
        for regime, arms in self.blocks:
            chosen = {}
            for arm in arms:
                steps = self._tuning(regime, arm, scores)
                wanted = next(steps)
                if isinstance(wanted, list):
                    runs += [run for run in wanted if run not in scores]
                else:
                    chosen[arm] = wanted
            # Seeds outside: a block that is cut off has compared its arms
            if len(chosen) == len(arms):
                tests = [self._at(regime, arm, chosen[arm], seed) for seed in self.test_seeds for arm in arms]
                runs += [run for run in tests if run not in scores]
        return runs

    def chosen(self, regime: str, arm: str, scores: Mapping[Run, float]) -> tuple[int, int] | None:
        """The rate and the place of the parameter's value that an arm is tested with; `None` before it is tuned."""
        wanted = next(self._tuning(regime, arm, scores))
        return None if isinstance(wanted, list) else wanted

    def _tuning(self, regime: str, arm: str, scores: Mapping[Run, float]) -> Iterator[list[Run] | tuple[int, int]]:
        """Yields the runs of the first stage of tuning that is not complete; if all are, the best setting."""

        def runs(points: Sequence[tuple[int, int]]) -> list[Run]:
            return [self._at(regime, arm, point, seed) for point in points for seed in self.tuning_seeds]

        def mean(point: tuple[int, int]) -> float:
            return statistics.fmean(scores[run] for run in runs([point]))

        points = [(rate, 0) for rate in self.rates]
        while True:
            if any(run not in scores for run in runs(points)):
                yield runs(points)
            best = max(points, key=mean)
            edge = {min(points): (best[0] - 2, 0), max(points): (best[0] + 2, 0)}.get(best)
            if edge is None or not self.extends:
                break
            points = sorted([*points, edge])
        if self.extends:
            places = range(1, len(ARMS[arm].values))
            further = [(best[0], place) for place in places] or [(best[0] - 1, 0), (best[0] + 1, 0)]
            if any(run not in scores for run in runs(further)):
                yield runs(further)
            best = max([best, *further], key=mean)
        yield best

    def _at(self, regime: str, arm: str, point: tuple[int, int], seed: int) -> Run:
        return Run(regime, arm, *point, seed)


QUICK = Plan(QUICK_BLOCKS, tuning_seeds=(0,), test_seeds=(100, 101), rates=(-18, -16), extends=False)


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
    jobs: int = field(default=2, metadata={"help": "Runs at a time, each with its share of the CPU cores."})
    minutes: float | None = field(
        default=None, metadata={"help": "After so many minutes, no other run begins. By default, all are made."}
    )
    known_runs: str | None = field(
        default=None,
        metadata={
            "help": "A runs.jsonl.gz of an earlier comparison with the same settings, whose runs are not made again."
        },
    )

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} has to be at least 1.")


def execute(run: Run, task: Path, folder: Path, options: Sequence[str]) -> dict:
    """
    Trains in this process, with all output in `run.log`. Of what the run leaves, its logs are kept.

    Returns:
        `dict`: The record of the run: what it was, its curves by step, and how many seconds it took.
    """
    from proma_trl.recipes import gsm8k

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    with _output_in(folder / "run.log"):
        gsm8k.main(
            [
                *("--config", str(CONFIGS / f"frontier_{run.regime}.yaml")),
                *("--model_name_or_path", str(task / "warm_start"), "--dataset_name", str(task / "problems")),
                *options,
                *run.options(),
                *("--output_dir", str(folder)),
            ]
        )
        gc.collect()
    seconds = time.monotonic() - begin
    for path in folder.iterdir():
        if path.name not in ("run.log", "metrics.jsonl"):
            path.unlink()
    return {**asdict(run), "seconds": round(seconds, 1), "curves": read_record(folder)}


def read_record(folder: Path) -> dict[str, dict[str, float]]:
    """The curves of a run that are kept, by step, with six digits."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {
        name: {str(r["step"]): float(f"{r[logged]:.6g}") for r in records if r.get(logged) is not None}
        for name, logged in SUMMARIES.items()
    }
    return {name: curve for name, curve in curves.items() if curve}


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


def read_runs(path: Path) -> dict[Run, dict]:
    """The records of a runs.jsonl, or of a runs.jsonl.gz, by run; curves have whole numbers as steps."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    records = {}
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):  # a process that was killed may have left half a line
            continue
        record = json.loads(line)
        record["curves"] = {
            name: {int(step): value for step, value in curve.items()} for name, curve in record["curves"].items()
        }
        records[Run(**{name: record[name] for name in ("regime", "arm", "rate", "value", "seed")})] = record
    return records


def check_settings(folder: Path, options: Sequence[str]) -> None:
    """
    Raises:
        ValueError: Where the folder holds runs with other settings.
    """
    regimes = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("frontier_*.yaml"))}
    settings = {"options": list(options), **regimes}
    path = folder / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{folder} holds runs with other settings. Choose another output_dir, or remove that folder.")
    path.write_text(json.dumps(settings, indent=2) + "\n")


def execute_all(
    plan: Plan, records: dict[Run, dict], output: Path, jobs: int, options: Sequence[str], minutes: float | None
) -> None:
    """Makes the plan's runs, and adds each to `records` and to runs.jsonl when it is complete."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    context = multiprocessing.get_context("spawn")
    running: dict[Future, Run] = {}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, (output / "runs.jsonl").open("a") as file:
        while True:
            scores = {run: frontier_score(record["curves"], BUDGETS) for run, record in records.items()}
            waiting = [run for run in plan.missing(scores) if run not in running.values()]
            while waiting and len(running) < jobs and time.monotonic() < end:
                run = waiting.pop(0)
                running[pool.submit(execute, run, output / "task", output / run.name, options)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, record = running.pop(future), future.result()
                file.write(json.dumps(record) + "\n")
                file.flush()
                record["curves"] = {n: {int(s): v for s, v in c.items()} for n, c in record["curves"].items()}
                records[run] = record
                score = frontier_score(record["curves"], BUDGETS)
                print(
                    f"{len(records)} complete, {len(waiting) + len(running)} or more to come. {run.name}: score "
                    f"{score:.3f}, {record['seconds']:.0f} s",
                    flush=True,
                )


def main(arguments: list[str]) -> None:
    """Parses the options, makes the runs that are missing, and writes the report."""
    parser = TrlParser(
        [FrontierArguments], description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    (args,) = parser.parse_args_and_config(arguments)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    plan, options = (QUICK, ["--max_steps", "16"]) if args.quick else (Plan(), [])
    check_settings(output, options)
    if not (output / "task" / "complete").is_file():
        print("Generating problems, and warm-starting a small policy with SFTTrainer.", flush=True)
        write_task(output / "task", seed=0, level="hard")
        (output / "task" / "complete").touch()
    records = {}
    for path in (args.known_runs, output / "runs.jsonl"):
        if path is not None and Path(path).is_file():
            records |= read_runs(Path(path))
    execute_all(plan, records, output, args.jobs, options, args.minutes)


if __name__ == "__main__":
    main(sys.argv[1:])
