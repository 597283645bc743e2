"""
The paper's Figure 2 from one command: PROMA against GRPO and REINFORCE on the same problems, seeds and settings.

    proma-trl compare --config figure2_cpu --output_dir runs/figure2

Trains with each algorithm and seed; options that are none of those below are those of `python -m
proma_trl.recipes.gsm8k`, which does it. A run that is complete is not run again, so an interrupted comparison goes on
where it stopped: give the same command again.

Leaves in the output folder: each run's folder with its metrics.jsonl, summary.json (means over the second half of the
steps and over seeds, standard deviations over seeds), and the figure as figure2.png and figure2.svg. With
--learning_rates, every algorithm is run at every rate with the first seed instead, and sweep.json and the figure
sweep.png and .svg are left: the rate whose accuracy, averaged over the algorithms, is best favours none of them.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from proma_trl.recipes.parser import RecipeParser, UsageError
from proma_trl.recipes.processes import last_step, run_logged
from proma_trl.recipes.word_problems import LEVELS, write_problems, write_task
from proma_trl.tools.curves import METRICS, read_curves, summarize
from proma_trl.tools.figures import draw_runs, draw_sweep

RECIPE = Path(__file__).parent / "gsm8k.py"

ALGORITHMS = {
    "proma": "--algorithm proma",
    "proma_intra": "--algorithm proma_intra",
    "proma_both": "--algorithm proma_both",
    "grpo": "--algorithm grpo",
    "reinforce": "--algorithm reinforce",
    "iterative": "--algorithm proma --projection iterative",
    "exact": "--algorithm proma --projection exact",
    "unbounded": "--algorithm proma --projection_bound inf",
    "isopo": "--algorithm isopo",
    "dppo": "--algorithm dppo",
    "proma_random": "--algorithm proma_random",
    "reinforce_matched": "--algorithm reinforce_matched",
}


@dataclass
class Figure2Arguments:
    """What to compare. All other options are those of recipes/gsm8k.py."""

    output_dir: str = field(default="runs/figure2", metadata={"help": "Where runs, summary and figures are left."})
    algorithms: list[str] = field(
        default_factory=lambda: ["proma", "grpo", "reinforce"],
        metadata={
            "help": f"The algorithms: {', '.join(ALGORITHMS)}. Options of recipes/gsm8k.py may follow within the "
            "quotes, for that algorithm alone: 'proma --projection_sweeps 4'."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The seeds of each algorithm."})
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Sweep these learning rates, with the first seed, instead."}
    )
    word_problems: str | None = field(
        default=None,
        metadata={
            "help": "Generate the problems of recipes/word_problems.py and train on them; its small policy, too, "
            "unless model_name_or_path is set.",
            "choices": list(LEVELS),
        },
    )
    jobs: int = field(default=1, metadata={"help": "Runs at a time, each with its share of the CPU cores."})
    smoothing: int = field(
        default=10, metadata={"help": "Logged values in the running means that the figure draws of KL and entropy."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "A configuration of `accelerate launch` for the runs; one process without."}
    )

    def __post_init__(self):
        for text in self.algorithms:
            if text.split()[0] not in ALGORITHMS:
                raise ValueError(f"algorithms: {text.split()[0]!r} is none of {', '.join(ALGORITHMS)}.")
        for name in ("algorithms", "seeds", "learning_rates"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name}={values} has to name at least one, and none twice.")
        for name in ("jobs", "smoothing"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be at least 1.")


@dataclass
class Run:
    """One run of recipes/gsm8k.py: its label in the comparison, its folder, and the options it is given."""

    label: str
    folder: Path
    options: list[str]

    def settings(self) -> dict[str, str]:
        """The options that decide the outcome, by name. Of an option that is given twice, the last counts."""
        settings = {}
        for i, option in enumerate(self.options):
            if option.startswith("--"):
                value = self.options[i + 1] if i + 1 < len(self.options) else "--"
                settings[option] = "true" if value.startswith("--") else value
        return settings

    def is_complete(self) -> bool:
        """
        Whether the run need not be run.

        Raises:
            ValueError: Where the folder holds a run with other settings.
        """
        path = self.folder / "settings.json"
        if not path.is_file():
            return False
        kept, own = json.loads(path.read_text()), self.settings()
        changed = [f"{name} {kept.get(name)}" for name in sorted(kept | own) if kept.get(name) != own.get(name)]
        if changed:
            raise UsageError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}). Choose another output_dir, or "
                "remove that folder."
            )
        return (self.folder / "complete").is_file()

    def step(self) -> int:
        """The last optimizer step that was logged."""
        return last_step(self.folder)

    def execute(self, launcher: Sequence[str], threads: int) -> None:
        """Trains in a process of its own, from the last checkpoint if there is one. Output goes to run.log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(self.settings(), indent=2))
        command = [sys.executable, *launcher, str(RECIPE), *self.options, "--output_dir", str(self.folder)]
        if any(self.folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "true"]
        else:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS", str(threads))
        run_logged(command, self.folder / "run.log", {"OMP_NUM_THREADS": threads})
        (self.folder / "complete").touch()


def folder_name(algorithm: str) -> str:
    """`proma --projection_sweeps 4` -> `proma_projection_sweeps_4`"""
    return re.sub(r"[^\w.-]+", "_", algorithm.replace("--", "")).strip("_")


def make_run(algorithm: str, folder: Path, options: Sequence[str], *own: str) -> Run:
    """An algorithm's run: the common options, then the algorithm's, then its own."""
    name, *more = shlex.split(algorithm)
    return Run(algorithm, folder / folder_name(algorithm), [*options, *ALGORITHMS[name].split(), *more, *own])


def execute_all(runs: Sequence[Run], max_steps: int, launcher: Sequence[str], jobs: int) -> None:
    """
    Executes the incomplete runs, a few at a time. A terminal shows overall progress and remaining time in one line.
    When a run is complete, that is printed.
    """
    waiting = [run for run in runs if not run.is_complete()]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        tqdm(
            total=len(waiting) * max_steps, unit="step", desc=f"{len(waiting)} runs", dynamic_ncols=True, disable=None
        ) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        futures = {pool.submit(run.execute, launcher, threads): run for run in waiting}
        done, not_done = set(), set(futures)
        while not_done and not any(future.exception() for future in done):
            ended, not_done = wait(not_done, timeout=2, return_when=FIRST_COMPLETED)
            done |= ended
            for future in ended:
                if not future.exception():
                    bar.write(f"Complete: {futures[future].folder}")
            bar.n = sum(run.step() for run in waiting)
            running = [futures[future] for future in not_done if future.running()]
            bar.set_postfix_str(", ".join(f"{run.label} {run.step()}/{max_steps}" for run in running))
        # After a failure: runs that have begun are left to their end, so that they need not be repeated
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """The summaries as a Markdown table."""
    lines = [f"| | {' | '.join(METRICS)} |", "| --- |" + " --- |" * len(METRICS)]
    for label, summary in summaries.items():
        cells = []
        for name in METRICS:
            spread = f" ± {summary[f'{name}_sd']:.2g}" if f"{name}_sd" in summary else ""
            cells.append(f"{summary[name]:.4g}{spread}" if name in summary else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(args: Figure2Arguments, options: Sequence[str], max_steps: int, launcher: Sequence[str]) -> None:
    """Runs every algorithm with every seed; writes summary.json and figure2.{png,svg}."""
    output = Path(args.output_dir)
    runs = {
        algorithm: [make_run(algorithm, output / f"seed_{seed}", options, "--seed", str(seed)) for seed in args.seeds]
        for algorithm in args.algorithms
    }
    # Seeds outside: an interrupted comparison has compared all algorithms
    execute_all(
        [run for of_seed in zip(*runs.values(), strict=True) for run in of_seed], max_steps, launcher, args.jobs
    )
    curves = {algorithm: [read_curves(run.folder) for run in seeds] for algorithm, seeds in runs.items()}
    summaries = {folder_name(algorithm): summarize(seeds) for algorithm, seeds in curves.items()}
    (output / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n")
    draw_runs(curves, output / "figure2", args.smoothing)
    print(f"{table(summaries)}\nSaved summary.json, figure2.png and figure2.svg in {output}.")


def sweep(args: Figure2Arguments, options: Sequence[str], max_steps: int, launcher: Sequence[str]) -> None:
    """Runs every algorithm at every learning rate with one seed; writes sweep.json and sweep.{png,svg}."""
    output, seed = Path(args.output_dir), args.seeds[0]
    runs = {}
    for rate in args.learning_rates:
        folder, own = output / f"learning_rate_{rate:g}", ("--seed", str(seed), "--learning_rate", f"{rate:g}")
        runs[rate] = {
            folder_name(algorithm): make_run(algorithm, folder, options, *own) for algorithm in args.algorithms
        }
    execute_all([run for of_rate in runs.values() for run in of_rate.values()], max_steps, launcher, args.jobs)
    summaries = {
        rate: {name: summarize([read_curves(run.folder)]) for name, run in of_rate.items()}
        for rate, of_rate in runs.items()
    }
    accuracies = {
        rate: fmean(summary["eval_accuracy"] for summary in of_rate.values()) for rate, of_rate in summaries.items()
    }
    best = {
        name: max(summaries, key=lambda rate: summaries[rate][name]["eval_accuracy"])
        for name in summaries[args.learning_rates[0]]
    }
    result = {
        "seed": seed,
        "learning_rates": {f"{rate:g}": of_rate for rate, of_rate in summaries.items()},
        "mean_eval_accuracy": {f"{rate:g}": accuracy for rate, accuracy in accuracies.items()},
        "chosen": max(accuracies, key=accuracies.get),
        "best_of_each": best,
    }
    (output / "sweep.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_sweep(summaries, output / "sweep")
    for rate, of_rate in summaries.items():
        print(f"\nLearning rate {rate:g}, mean accuracy {accuracies[rate]:.3f}\n{table(of_rate)}")
    print(f"Chosen: {result['chosen']:g}. Saved sweep.json, sweep.png and sweep.svg in {output}.")


def make_task(folder: Path, level: str, options: Sequence[str]) -> list[str]:
    """Generates problems, and a policy where the options name none. Returns the options that name what is there."""
    own_policy = "--model_name_or_path" not in options
    if not (folder / "complete").is_file():
        if own_policy:
            print("Generating problems, and warm-starting a small policy with SFTTrainer.", flush=True)
            write_task(folder, seed=0, level=level)
        else:
            write_problems(folder / "problems", seed=0, level=level)
        (folder / "complete").touch()
    policy = ["--model_name_or_path", str(folder / "warm_start")] if own_policy else []
    if own_policy:
        # Nothing is needed from the network, and nothing is asked for there.
        os.environ["HF_HUB_OFFLINE"] = "1"
    return [*policy, "--dataset_name", str(folder / "problems")]


def parse_options(arguments: Sequence[str]) -> tuple[Figure2Arguments, list[str], int]:
    """
    Returns what to compare, the options of all runs, and their number of optimizer steps.

    Raises:
        UsageError: For settings that are refused.
    """
    parser = RecipeParser([Figure2Arguments], description=__doc__, allow_abbrev=False)
    args, options = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    max_steps = Run("", Path(), options).settings().get("--max_steps", "")
    if not max_steps.isdigit() or int(max_steps) < 1:
        raise UsageError("max_steps is not set. Set it, so that all runs take as many optimizer steps.")
    return args, options, int(max_steps)


def check_options(arguments: Sequence[str]) -> None:
    """
    Check what the runs are handed, before the first of them.

    Raises:
        UsageError: For settings that are refused.
    """
    from proma_trl.recipes.gsm8k import GSM8KArguments
    from proma_trl.recipes.training import check_model, choose_algorithm, make_parser

    args, options, _ = parse_options(arguments)
    for algorithm in args.algorithms:
        own = make_run(algorithm, Path(args.output_dir), options).options
        parser = make_parser(GSM8KArguments, choose_algorithm(own))
        _, training_args, model_args, *_ = parser.parse_args_and_config(own)
    if model_args.model_name_or_path is not None:
        check_model(model_args, training_args.trust_remote_code)
    elif args.word_problems is None:
        raise UsageError("model_name_or_path is not set. Set it, or word_problems, which comes with a small policy.")


def main(arguments: list[str]) -> None:
    """Parses the options and runs the comparison or the sweep."""
    args, options, max_steps = parse_options(arguments)
    if args.word_problems is not None:
        options = [*make_task(Path(args.output_dir) / "task", args.word_problems, options), *options]
    launcher = []
    if args.accelerate_config is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", args.accelerate_config]
    run = compare if args.learning_rates is None else sweep
    run(args, options, max_steps, launcher)


if __name__ == "__main__":
    main(sys.argv[1:])
