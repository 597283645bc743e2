"""What a run reaches within a divergence from its initial policy, and how two algorithms compare over paired seeds."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from .curves import Curves


def accuracy_within(run: Curves, budget: float) -> float:
    """
    The accuracy of a run when its KL divergence from the initial policy first exceeds a budget.

    It is interpolated linearly between the evaluations before and after, along the largest divergence so far. A run
    that stays within the budget counts with its last evaluation.

    Args:
        run (`Curves`): With `eval_accuracy` and `global_kl`, measured at the same steps. Before training, the latter
            is zero.
        budget (`float`): In nats per token.
    """
    steps, divergences = _frontier(run)
    accuracies = [run["eval_accuracy"][step] for step in steps]
    for i in range(1, len(steps)):
        if divergences[i] > budget:
            share = (budget - divergences[i - 1]) / (divergences[i] - divergences[i - 1])
            return accuracies[i - 1] + share * (accuracies[i] - accuracies[i - 1])
    return accuracies[-1]


def never_exceeds(run: Curves, budget: float) -> bool:
    """Whether a run's KL divergence from the initial policy stays within a budget at all its evaluations."""
    return _frontier(run)[1][-1] <= budget


def every_second_evaluation(run: Curves) -> Curves:
    """
    A run as if it had been evaluated half as often: before training, then at every second evaluation, so that the
    last one is left out if their number is odd.
    """
    return {**run, "eval_accuracy": {step: run["eval_accuracy"][step] for step in sorted(run["eval_accuracy"])[::2]}}


def frontier_score(run: Curves, budgets: Sequence[float]) -> float:
    """The mean over budgets of [`accuracy_within`]."""
    return statistics.fmean(accuracy_within(run, budget) for budget in budgets)


def final_accuracy(run: Curves, evaluations: int = 3) -> float:
    """The mean of the last evaluations."""
    curve = run["eval_accuracy"]
    return statistics.fmean(curve[step] for step in sorted(curve)[-evaluations:])


def step_reaching(run: Curves, accuracy: float) -> int | None:
    """The first evaluation with at least this accuracy, as its step; `None` if there is none."""
    curve = run["eval_accuracy"]
    return next((step for step in sorted(curve) if curve[step] >= accuracy), None)


def mean_until(run: Curves, name: str, step: int) -> float:
    """The mean of a metric over the measurements up to a step."""
    return statistics.fmean(value for at, value in run[name].items() if at <= step)


def mean_since(run: Curves, name: str, step: int, steps: int) -> float:
    """The mean of a metric over the last `steps` optimizer steps up to a step."""
    return statistics.fmean(value for at, value in run[name].items() if step - steps < at <= step)


def paired_interval(
    differences: Sequence[float], confidence: float = 0.95, resamples: int = 20000
) -> tuple[float, float]:
    """
    A bootstrap interval of the mean of paired differences, by the percentile method: seeds are drawn with replacement.

    Args:
        differences (`Sequence[float]`): One a seed.
        confidence (`float`, *optional*, defaults to `0.95`): What part of the resampled means lies within.
        resamples (`int`, *optional*, defaults to `20000`): Number of resampled means, from a fixed random seed.
    """
    values = np.asarray(differences, dtype=float)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    outside = (1 - confidence) / 2
    low, high = np.quantile(values[drawn].mean(1), [outside, 1 - outside])
    return float(low), float(high)


def paired_t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """
    Student's t-interval of the mean of paired differences.

    With ten seeds or fewer it is the more careful one: bootstrap percentiles of so few values are too narrow.

    Args:
        differences (`Sequence[float]`): One a seed, two at least.
        confidence (`float`, *optional*, defaults to `0.95`): How often such an interval covers the mean, where
            differences are normal.

    Raises:
        ValueError: There are fewer than two differences.
    """
    if len(differences) < 2:
        raise ValueError(f"A t-interval needs two differences at least, and there is {len(differences)}.")
    mean = statistics.fmean(differences)
    quantile = student_t_quantile(confidence, len(differences) - 1)
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - half, mean + half


def student_t_quantile(confidence: float, freedom: int) -> float:
    """
    The t for which Student's distribution lies within ±t with this probability, to rounding.

    Args:
        confidence (`float`): Between 0 and 1, both excluded.
        freedom (`int`): Degrees of freedom, 1 or more.
    """
    # Bisection of the angle whose tangent is t / sqrt(freedom): it is bounded, and the probability rises with it
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _probability_within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability_within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)), by its finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term, total = math.cos(angle) ** odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def sign_flip_p(differences: Sequence[float]) -> float:
    """
    The two-sided p-value of a sign-flip (randomization) test that paired differences are symmetric about zero: the
    share of all 2^n choices of signs whose mean is as far from zero as theirs. It is exact, and assumes no shape.

    Args:
        differences (`Sequence[float]`): One a seed, 20 at most.

    Raises:
        ValueError: There are no differences, or more than 20.
    """
    if not 0 < len(differences) <= 20:
        raise ValueError(
            f"A sign-flip test goes over 2^n choices of signs, for 1 to 20 seeds: got {len(differences)}."
        )
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    # Sums in another order round otherwise
    rounding = 1e-12 * sum(map(abs, differences))
    return float((np.abs(sums) >= abs(sum(differences)) - rounding).mean())


def probability_of_improvement(ours: Sequence[float], others: Sequence[float]) -> float:
    """
    The probability that a run of ours is better than one of the others, over all pairs of runs; ties count half
    (Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021).
    """
    x, y = np.asarray(ours, dtype=float)[:, None], np.asarray(others, dtype=float)[None]
    return float(((x > y) + 0.5 * (x == y)).mean())


def _frontier(run: Curves) -> tuple[list[int], list[float]]:
    """The steps of a run's evaluations, and the largest divergence up to each."""
    accuracies, divergences = run["eval_accuracy"], run["global_kl"]
    steps = sorted(step for step in accuracies if step == 0 or step in divergences)
    reached = np.maximum.accumulate([0.0 if step == 0 else divergences[step] for step in steps])
    return steps, reached.tolist()
