"""Endpoints of runs and paired statistics, by hand."""

import itertools
import math

import numpy as np
import pytest

from proma_trl.tools.figures import draw_frontiers, draw_tuning
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
    student_t_quantile,
)

RUN = {
    "eval_accuracy": {0: 0.2, 4: 0.4, 8: 0.8, 12: 0.7},
    "global_kl": {4: 0.01, 8: 0.03, 12: 0.02},
    "local_kl": {4: 3.0, 8: 1.0, 12: 5.0},
}


@pytest.mark.parametrize(
    "budget,accuracy",
    # A divergence that falls again was exceeded all the same
    [(0.0, 0.2), (0.005, 0.3), (0.01, 0.4), (0.02, 0.6), (0.03, 0.7), (1.0, 0.7)],
)
def test_accuracy_within_a_budget(budget, accuracy):
    assert accuracy_within(RUN, budget) == pytest.approx(accuracy)


def test_a_step_that_was_not_measured_does_not_count():
    run = {"eval_accuracy": {0: 0.2, 3: 0.9, 4: 0.4}, "global_kl": {4: 0.01}}
    assert accuracy_within(run, 0.005) == pytest.approx(0.3)


def test_score():
    assert frontier_score(RUN, (0.005, 0.02)) == pytest.approx(0.45)


def test_a_divergence_that_falls_again_was_exceeded():
    assert [never_exceeds(RUN, budget) for budget in (0.01, 0.025, 0.03, 0.1)] == [False, False, True, True]


def test_every_second_evaluation():
    half = every_second_evaluation(RUN)
    assert half["eval_accuracy"] == {0: 0.2, 8: 0.8} and half["local_kl"] == RUN["local_kl"]
    # A line from (0, 0.2) to (0.03, 0.8)
    assert accuracy_within(half, 0.01) == pytest.approx(0.4) and accuracy_within(half, 0.02) == pytest.approx(0.6)


def test_at_equal_accuracy():
    assert step_reaching(RUN, 0.75) == 8
    assert step_reaching(RUN, 0.9) is None
    assert step_reaching(RUN, 0.1) == 0
    assert mean_until(RUN, "local_kl", 8) == 2.0
    assert mean_since(RUN, "local_kl", 12, 8) == 3.0
    assert final_accuracy(RUN, 2) == pytest.approx(0.75)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        low, high = paired_interval(rng.normal(1.0, 1.0, 40), resamples=1000)
        hits += low <= 1.0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_interval_is_reproducible_and_narrower_with_less_confidence():
    values = [0.1, 0.4, 0.2, 0.9]
    low, high = paired_interval(values)
    assert (low, high) == paired_interval(values)
    assert min(values) <= low < np.mean(values) < high <= max(values)
    inner = paired_interval(values, confidence=0.5)
    assert low < inner[0] < inner[1] < high
    assert paired_interval([0.3]) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    # scipy.stats.t.ppf((1 + confidence) / 2, freedom)
    [
        (0.95, 1, 12.706204736432095),
        (0.95, 2, 4.302652729911275),
        (0.95, 5, 2.5705818366147395),
        (0.95, 9, 2.2621571628540993),
        (0.99, 9, 3.2498355440153697),
        (0.5, 4, 0.7406970841126825),
        (0.95, 30, 2.0422724563012373),
    ],
)
def test_quantiles_of_students_distribution(confidence, freedom, quantile):
    assert student_t_quantile(confidence, freedom) == pytest.approx(quantile, rel=1e-9)


def test_t_interval():
    # A mean of 2 with a standard error of 1 / sqrt(3)
    half = 4.302652729911275 / math.sqrt(3)
    assert paired_t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half))
    assert paired_t_interval([0.25] * 4) == (0.25, 0.25)
    with pytest.raises(ValueError, match="two differences at least"):
        paired_t_interval([0.3])


def test_t_interval_of_few_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    drawn = rng.normal(1.0, 1.0, (500, 6))
    covered = {
        interval: np.mean([low <= 1.0 <= high for low, high in map(interval, drawn.tolist())])
        for interval in (paired_t_interval, lambda values: paired_interval(values, resamples=300))
    }
    t, bootstrap = covered.values()
    # The standard deviation of such a share is 0.01
    assert abs(t - 0.95) < 0.03 and bootstrap < 0.91


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),
        ([-1.0, -2.0, -3.0], 2 / 8),
        # Sums of 4 and more in size: +++, -++ and their opposites
        ([-1.0, 2.0, 3.0], 4 / 8),
        ([1.0, -1.0], 1.0),
        ([0.0, 0.0, 0.0], 1.0),
        ([0.5], 1.0),
        ([0.1] * 10, 2 / 1024),
    ],
)
def test_sign_flips_by_hand(differences, p):
    assert sign_flip_p(differences) == p


def test_sign_flips_one_by_one():
    differences = np.random.default_rng(3).normal(0.5, 1.0, 9)
    flips = np.array(list(itertools.product((1, -1), repeat=9)))
    means = np.abs((flips * differences).mean(1))
    # The signs as they are come first
    assert sign_flip_p(differences.tolist()) == np.mean(means >= means[0] * (1 - 1e-9))


@pytest.mark.parametrize("count", [0, 21])
def test_sign_flips_of_too_few_or_too_many(count):
    with pytest.raises(ValueError, match=f"1 to 20 seeds: got {count}"):
        sign_flip_p([0.1] * count)


def test_probability_of_improvement():
    assert probability_of_improvement([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert probability_of_improvement([0.0, 2.0], [1.0, 2.0]) == pytest.approx(0.375)


def test_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    arms = {f"arm {i}": [(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05)] * 3 for i in range(10)}
    draw_frontiers([0.0, 0.01, 0.02], arms, tmp_path / "frontier")
    draw_tuning({"proma": {1e-5: 0.1, 1e-4: 0.3}, "grpo": {1e-5: 0.2, 1e-4: 0.1}}, tmp_path / "tuning")
    for name, labels in (("frontier", arms), ("tuning", ["proma", "grpo", "Frontier score"])):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / f"{name}.svg").read_text()
        assert all(f"<!-- {label}" in svg for label in labels)
