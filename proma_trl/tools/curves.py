"""What runs have left behind in their `metrics.jsonl`, and how algorithms compare by it."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

# Names in a summary, and in the trainers' logs
METRICS = {
    "eval_accuracy": "eval_accuracy",
    "local_kl": "kl/local",
    "global_kl": "kl/global",
    "entropy": "entropy",
}

Curves = dict[str, dict[int, float]]


def read_curves(folder: Path, metrics: Mapping[str, str] = METRICS) -> Curves:
    """Returns each metric that a run has logged, as values by optimizer step; `metrics` maps names to logged ones."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {
        name: {record["step"]: record[logged] for record in records if record.get(logged) is not None}
        for name, logged in metrics.items()
    }
    return {name: curve for name, curve in curves.items() if curve}


def second_half(curve: dict[int, float]) -> float:
    """The mean over the second half of a run's steps."""
    last = max(curve)
    return statistics.fmean(value for step, value in curve.items() if step > last / 2)


def summarize(runs: Sequence[Curves]) -> dict[str, float]:
    """
    Summarizes the runs of one algorithm that differ in their seeds.

    Returns:
        `dict[str, float]`: of each metric the mean over seeds and over the second half of the steps, and as
        `<name>_sd` the standard deviation over seeds, where there are several.
    """
    summary = {}
    for name in METRICS:
        means = [second_half(run[name]) for run in runs if name in run]
        if means:
            summary[name] = statistics.fmean(means)
        if len(means) > 1:
            summary[f"{name}_sd"] = statistics.stdev(means)
    return summary


def mean_and_spread(runs: Sequence[Curves], name: str) -> tuple[list[int], list[float], list[float]]:
    """Returns the steps at which all runs have a metric, and its mean and standard deviation over runs there."""
    curves = [run[name] for run in runs if name in run]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return steps, [statistics.fmean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
