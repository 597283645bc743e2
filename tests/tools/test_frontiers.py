"""Endpoints of runs and paired statistics, by hand."""

import numpy as np
import pytest

from proma_trl.tools.figures import draw_frontiers, draw_tuning
from proma_trl.tools.frontiers import (
    accuracy_within,
    final_accuracy,
    frontier_score,
    mean_since,
    mean_until,
    paired_interval,
    probability_of_improvement,
    step_reaching,
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
