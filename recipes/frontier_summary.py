"""The numbers of the comparison in docs/protocol.md, from its runs: endpoints, intervals and paired differences."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from proma_trl.recipes.frontier_plan import ARMS, CONTROLS, REGIMES, Block, Plan, Regime, Run
from proma_trl.tools.curves import Curves
from proma_trl.tools.frontiers import (
    accuracy_within,
    every_second_evaluation,
    final_accuracy,
    frontier_score,
    mean_since,
    mean_until,
    never_exceeds,
    paired_interval,
    paired_t_interval,
    probability_of_improvement,
    sign_flip_p,
    step_reaching,
)

Records = Mapping[Run, Mapping[str, Any]]

_BASELINES = ("reinforce", "grpo")
# What an arm is compared with beside the baselines
_COUNTERPARTS = {
    "proma": CONTROLS,
    "proma_intra": ("intra_matched", "proma"),
    "proma_both": ("proma", "proma_intra"),
    "proma_dppo": ("dppo", "proma"),
    "intra_dppo": ("dppo", "proma_intra"),
}
# What only arms of one kind log: the controls of step length, trust regions, and projections
OWN_CURVES = ("length_ratio", "masked", "removed")
_OVERLAPS = ("update_overlap", "update_tensor_overlap", "update_last_tensor_overlap")


def score(run: Curves, regime: Regime) -> float:
    """The primary endpoint."""
    return frontier_score(run, regime.budgets)


def score_all(records: Records) -> dict[Run, float]:
    """The primary endpoint of all runs, each by its regime."""
    return {run: score(record["curves"], REGIMES[run.regime]) for run, record in records.items()}


def accuracy_at_the_end(run: Curves) -> float:
    """On all problems that are held out, where that was measured; else the mean of the last three evaluations."""
    at_the_end = run.get("final_accuracy")
    return final_accuracy(run) if at_the_end is None else at_the_end[max(at_the_end)]


def endpoints(run: Curves, regime: Regime) -> dict[str, float | None]:
    """What the protocol asks of a run; `None` for what it lacks: it may never evaluate at the target."""
    reached = step_reaching(run, regime.target)
    found = {"score": score(run, regime)}
    found |= {f"within_{budget:g}": accuracy_within(run, budget) for budget in regime.budgets}
    found["final_accuracy"] = accuracy_at_the_end(run)
    found["completions_to_target"] = None if reached is None else regime.completions_a_step * reached
    found["local_kl_to_target"] = None if not reached else mean_until(run, "local_kl", reached)
    window = round(2 / regime.rollouts * max(run["eval_accuracy"]))
    for name in OWN_CURVES:
        found[name] = statistics.fmean(run[name].values()) if run.get(name) else None
    found["entropy_at_target"] = None if not reached else mean_since(run, "entropy", reached, window)
    return found


def summarize_arm(runs: Sequence[Curves], regime: Regime) -> dict[str, Any]:
    """Means and intervals of the endpoints over seeds: of each, over the runs that have it."""
    found = [endpoints(run, regime) for run in runs]
    summary = {"seeds": len(runs), "reached_target": sum(e["completions_to_target"] is not None for e in found)}
    for budget in regime.budgets:
        summary[f"never_exceed_{budget:g}"] = sum(never_exceeds(run, budget) for run in runs)
    for name in found[0]:
        values = [e[name] for e in found if e[name] is not None]
        if values:
            summary[name] = [statistics.fmean(values), *paired_interval(values)]
    return summary


def compare(ours: Mapping[int, Curves], others: Mapping[int, Curves], regime: Regime) -> dict[str, Any]:
    """
    Paired differences over the seeds that both have, and the probability of improvement of the score.

    Of each endpoint, the mean difference, `<endpoint>_t`, its t-interval (`None` for a single seed), and
    `<endpoint>_p`, the p-value of a sign-flip test. The endpoints are the score and final accuracy, whose means stand
    with their bootstrap intervals, the accuracy within each budget, and the score of every second evaluation.
    """
    seeds = [seed for seed in ours if seed in others]

    def scored(run: Curves) -> float:
        return score(run, regime)

    measured: dict[str, Callable[[Curves], float]] = {
        "score": scored,
        "final_accuracy": accuracy_at_the_end,
        **{f"within_{budget:g}": partial(accuracy_within, budget=budget) for budget in regime.budgets},
        "score_every_second": lambda run: scored(every_second_evaluation(run)),
    }
    found: dict[str, Any] = {
        "seeds": len(seeds),
        "probability_of_improvement": probability_of_improvement(
            [scored(ours[seed]) for seed in seeds], [scored(others[seed]) for seed in seeds]
        ),
    }
    for name, endpoint in measured.items():
        differences = [endpoint(ours[seed]) - endpoint(others[seed]) for seed in seeds]
        mean = statistics.fmean(differences)
        found[name] = [mean, *paired_interval(differences)] if name in ("score", "final_accuracy") else mean
        found[f"{name}_t"] = [*paired_t_interval(differences)] if len(seeds) > 1 else None
        found[f"{name}_p"] = sign_flip_p(differences)
    return found


def width(tuned: Mapping[int, Sequence[Curves]]) -> float:
    """Decades of learning rates, half a one each, whose mean final accuracy is within two points of the best."""
    means = {rate: statistics.fmean(map(accuracy_at_the_end, runs)) for rate, runs in tuned.items()}
    return 0.5 * sum(mean >= max(means.values()) - 0.02 for mean in means.values())


class RegimeRuns:
    """
    The complete runs of a regime.

    Attributes:
        chosen (`dict`): Of each arm that is tuned, the point that tuning has chosen.
        test (`dict`): Of each arm that has any, its runs at that point with the test seeds, by seed.
        tuning (`dict`): Of each arm, its runs with the tuning seeds at the parameter's first value, by rate.
        values (`dict`): Of each arm with a parameter, its runs with the tuning seeds at the rate that is tested, by
            the parameter's value.
        is_test (`bool`): Whether the test seeds are others than those of tuning.
    """

    def __init__(self, name: str, plan: Plan, records: Records):
        self.name = name
        self.regime = REGIMES[name]
        self.chosen: dict[str, tuple[int, int]] = {}
        self.test: dict[str, dict[int, Curves]] = {}
        self.tuning: dict[str, dict[int, list[Curves]]] = {}
        self.values: dict[str, dict[str | float, list[Curves]]] = {}
        scores = score_all(records)
        blocks = [block for block in plan.blocks if block.regime == name]
        self.is_test = all(block.test_seeds != block.tuning_seeds for block in blocks)
        for block in blocks:
            for arm in block.arms:
                self._read_tuning(block, arm, records)
                point = plan.chosen(block, arm, scores)
                if point is not None:
                    self._read_values(block, arm, point[0], records)
                    self._read_test(block, arm, point, records)

    def _read_tuning(self, block: Block, arm: str, records: Records) -> None:
        # Of half decades: the rates halfway between them, which REINFORCE has, are no wider a range
        rates = {run.rate for run in records if (run.regime, run.arm) == (self.name, arm) and run.rate % 2 == 0}
        for rate in sorted(rates):
            runs = [block.run(arm, (rate, 0), seed) for seed in block.tuning_seeds]
            if block.tuned_in is None and all(run in records for run in runs):
                self.tuning.setdefault(arm, {})[rate] = [records[run]["curves"] for run in runs]

    def _read_values(self, block: Block, arm: str, rate: int, records: Records) -> None:
        for place, value in enumerate(ARMS[arm].values):
            runs = [block.run(arm, (rate, place), seed) for seed in block.tuning_seeds]
            if block.tuned_in is None and all(run in records for run in runs):
                self.values.setdefault(arm, {})[value] = [records[run]["curves"] for run in runs]

    def _read_test(self, block: Block, arm: str, point: tuple[int, int], records: Records) -> None:
        self.chosen[arm] = point
        runs = {seed: block.run(arm, point, seed) for seed in block.test_seeds}
        found = {seed: records[run]["curves"] for seed, run in runs.items() if run in records}
        if found:
            self.test[arm] = found

    def setting(self, arm: str) -> dict[str, Any]:
        """The learning rate and the parameter that an arm is tested with."""
        run = Run(self.name, arm, *self.chosen[arm], 0)
        parameter = ARMS[arm].parameter
        own = {"parameter": f"{parameter.removeprefix('--')} {ARMS[arm].values[run.value]}"} if parameter else {}
        return {"learning_rate": run.learning_rate, **own}

    def tuned(self) -> dict[str, dict[str, Any]]:
        """
        What tuning has seen, as means over its seeds: of each arm the score and the final accuracy by learning rate,
        and the score by the value of its parameter.
        """

        def mean(endpoint: Callable[[Curves], float], runs: Sequence[Curves]) -> float:
            return statistics.fmean(map(endpoint, runs))

        def scored(run: Curves) -> float:
            return score(run, self.regime)

        found: dict[str, dict[str, Any]] = {}
        for arm, rates in self.tuning.items():
            found[arm] = {"rates": {}, "values": {}}
            for rate, runs in rates.items():
                learning_rate = Run(self.name, arm, rate, 0, 0).learning_rate
                found[arm]["rates"][f"{learning_rate:g}"] = [mean(scored, runs), mean(accuracy_at_the_end, runs)]
            for value, runs in self.values.get(arm, {}).items():
                found[arm]["values"][str(value)] = mean(scored, runs)
        return found

    def edge(self, arm: str) -> str:
        """Whether the parameter that is tested is the smallest or the largest that was tried."""
        values = self.values.get(arm, {})
        if len(values) < 2 or any(isinstance(value, str) for value in values):
            return ""
        value = ARMS[arm].values[self.chosen[arm][1]]
        return {min(values): "smallest", max(values): "largest"}.get(value, "")

    def arms(self) -> dict[str, dict[str, Any]]:
        """Of each arm that is tested, its setting and its endpoints."""
        summaries = {}
        for arm, runs in self.test.items():
            summaries[arm] = self.setting(arm)
            if arm in self.tuning:
                summaries[arm]["rate_decades"] = width(self.tuning[arm])
            if self.edge(arm):
                summaries[arm]["edge"] = self.edge(arm)
            summaries[arm] |= summarize_arm([*runs.values()], self.regime)
        return summaries

    def pairs(self) -> dict[str, dict[str, Any]]:
        """Each arm with its counterparts, with REINFORCE and with GRPO."""
        return {
            f"{arm} - {other}": compare(self.test[arm], self.test[other], self.regime)
            for arm in self.test
            for other in (*_COUNTERPARTS.get(arm, ()), *_BASELINES)
            if other != arm and set(self.test[arm]) & set(self.test.get(other, ()))
        }

    def overlaps(self) -> dict[str, dict[str, float]]:
        """Of each arm, the means over measured steps and runs of what `UpdateOverlap` logs."""
        found = {}
        for arm, runs in self.test.items():
            curves = {name: [value for run in runs.values() for value in run[name].values()] for name in _OVERLAPS}
            found[arm] = {
                **self.setting(arm),
                "runs": len(runs),
                "score": statistics.fmean(score(run, self.regime) for run in runs.values()),
                **{name: statistics.fmean(values) for name, values in curves.items()},
            }
        return found


def read_regimes(plan: Plan, records: Records) -> dict[str, RegimeRuns]:
    """The complete runs of all regimes, by name."""
    return {name: RegimeRuns(name, plan, records) for name in dict.fromkeys(block.regime for block in plan.blocks)}


def summarize(regimes: Mapping[str, RegimeRuns]) -> dict[str, dict[str, Any]]:
    """
    The numbers of all regimes that have any: arms and pairs where there is a test, and else overlaps; what tuning has
    seen, where arms are tuned.
    """
    summary = {}
    for name, regime in regimes.items():
        if not regime.test:
            continue
        if not regime.is_test:
            summary[name] = {"overlaps": regime.overlaps()}
        elif name == "groups":
            pairs = {
                f"{arm}: groups - shuffled": compare(runs, regimes["on_policy"].test[arm], regime.regime)
                for arm, runs in regime.test.items()
                if set(runs) & set(regimes["on_policy"].test.get(arm, ()))
            }
            summary[name] = {"arms": regime.arms(), "pairs": pairs}
        else:
            summary[name] = {"arms": regime.arms(), "pairs": regime.pairs()}
        if regime.tuning:
            summary[name]["tuning"] = regime.tuned()
    return summary
