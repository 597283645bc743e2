import json

import pytest

from proma_trl.tools.curves import METRICS, mean_and_spread, read_curves, second_half, summarize
from proma_trl.tools.figures import PANELS, draw_runs, draw_sweep

pytest.importorskip("matplotlib", reason="figures need matplotlib")


def make_curves(scale, steps=10):
    return {name: {step: scale * step for step in range(1, steps + 1)} for name in METRICS}


def test_read_curves(tmp_path):
    records = [
        {"eval_accuracy": 0.25, "step": 0},
        {"kl/local": 1e-3, "kl/global": None, "entropy": 0.5, "reward": 1.0, "step": 1},
        {"kl/local": 2e-3, "entropy": 0.4, "step": 2},
        {"eval_accuracy": 0.5, "step": 2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_curves(tmp_path) == {
        "eval_accuracy": {0: 0.25, 2: 0.5},
        "local_kl": {1: 1e-3, 2: 2e-3},
        "entropy": {1: 0.5, 2: 0.4},
    }


def test_second_half():
    assert second_half({0: 9.0, 4: 9.0, 5: 1.0, 8: 2.0}) == 1.5
    assert second_half({7: 3.0}) == 3.0


def test_summary():
    summary = summarize([make_curves(1.0), make_curves(3.0)])
    for name in METRICS:
        # Steps 6 to 10 have the mean 8
        assert summary[name] == pytest.approx(16)
        assert summary[f"{name}_sd"] == pytest.approx(8 * 2**0.5)
    assert set(summarize([make_curves(1.0)])) == set(METRICS)


def test_mean_and_spread_where_all_runs_have_values():
    runs = [{"entropy": {1: 1.0, 2: 2.0}}, {"entropy": {2: 4.0, 3: 5.0}}]
    assert mean_and_spread(runs, "entropy") == ([2], [3.0], [pytest.approx(2**0.5)])
    assert mean_and_spread([runs[0]], "entropy") == ([1, 2], [1.0, 2.0], [0.0, 0.0])
    assert mean_and_spread([{}], "entropy") == ([], [], [])


def assert_is_figure(stem, labels):
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    svg = stem.with_suffix(".svg").read_text()
    for text in (*PANELS.values(), *labels):
        # Matplotlib draws text as paths and names them in comments
        assert f"<!-- {text}" in svg or text in svg, text


def test_figure_of_runs(tmp_path):
    runs = {"proma": [make_curves(1.0), make_curves(2.0)], "grpo": [make_curves(3.0)]}
    del runs["grpo"][0]["local_kl"]
    draw_runs(runs, tmp_path / "figure2", window=3)
    assert_is_figure(tmp_path / "figure2", ["proma", "grpo", "Optimizer step"])


def test_figure_of_a_sweep(tmp_path):
    summaries = {rate: {"proma": summarize([make_curves(rate)])} for rate in (1e-5, 1e-4)}
    draw_sweep(summaries, tmp_path / "sweep")
    assert_is_figure(tmp_path / "sweep", ["proma", "Learning rate"])
