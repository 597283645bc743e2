"""What the comparison says of its runs, on runs that are made up."""

import gzip
import json
import statistics

import pytest
from support.frontier import make_all

from proma_trl.recipes import frontier_report
from proma_trl.recipes.frontier_plan import PRETRAINED, PROTOCOL, QUICK, REGIMES, Block, Plan
from proma_trl.recipes.frontier_summary import RegimeRuns, read_regimes, score, summarize, summarize_arm

pytest.importorskip("matplotlib", reason="figures need matplotlib")


OVERLAPS = ("overlap", "tensor_overlap", "last_tensor_overlap")


def curves(scale, entropy=0.5):
    """Accuracy that rises over ten evaluations, with a divergence of a certain rate."""
    steps = range(4, 41, 4)
    return {
        "eval_accuracy": {0: 0.2, **{step: min(0.9, 0.2 + step / 40) for step in steps}},
        "global_kl": {step: scale * step for step in steps},
        "local_kl": dict.fromkeys(steps, scale),
        "entropy": dict.fromkeys(range(1, 41), entropy),
    }


def made_up(plan):
    """Records in which PROMA diverges half as much as the others."""
    records = {}

    def make(run):
        scale = 0.0005 if run.arm == "proma" else 0.001
        made = curves(scale * (1 + 0.001 * run.seed + abs(run.rate + 17)))
        if run.regime in ("adamw", "sgd"):
            made |= {f"update_{name}": {8: 0.1, 16: 0.3} for name in OVERLAPS}
        records[run] = {"seconds": 1.0, "curves": made}
        return score(made, REGIMES[run.regime])

    make_all(plan, make)
    return records


def test_numbers():
    plan = Plan([Block("on_policy", ["proma", "reinforce", "proma_random"], extends=False)])
    records = made_up(plan)
    summary = summarize(read_regimes(plan, records))["on_policy"]
    test = [run for run in records if run.arm == "proma" and run.seed >= 100]
    assert len(test) == 10
    proma = summary["arms"]["proma"]
    assert proma["score"][0] == pytest.approx(
        statistics.fmean(score(records[run]["curves"], REGIMES["on_policy"]) for run in test)
    )
    assert proma["seeds"] == proma["reached_target"] == 10
    assert proma["learning_rate"] == 3.2e-5 and proma["parameter"] == "projection_bound 0.5"
    # All rates end at the same accuracy
    assert proma["rate_decades"] == 2.0
    assert proma["completions_to_target"][0] == 128 * 24
    assert proma["entropy_at_target"] == [0.5, 0.5, 0.5] and proma["local_kl_to_target"][0] > 0
    pair = summary["pairs"]["proma - proma_random"]
    assert pair["score"][1] > 0 and pair["probability_of_improvement"] == 1.0 and pair["seeds"] == 10
    # Every seed is better, so of 1,024 choices of signs only theirs and its opposite are as far from zero
    assert pair["score_t"][0] > 0 and pair["score_p"] == 2 / 1024
    assert summary["pairs"]["proma - reinforce"]["final_accuracy"][0] == pytest.approx(0)
    assert "reinforce - grpo" not in summary["pairs"] and "reinforce - reinforce" not in summary["pairs"]


def test_pairs_are_of_equal_seeds():
    plan = Plan([Block("on_policy", ["proma", "reinforce"], extends=False)])
    records = made_up(plan)
    records = {run: r for run, r in records.items() if run.arm == "proma" or run.seed not in (103, 107)}
    assert summarize(read_regimes(plan, records))["on_policy"]["pairs"]["proma - reinforce"]["seeds"] == 8


def test_an_arm_that_never_reaches_the_target():
    run = curves(0.001)
    run["eval_accuracy"] = dict.fromkeys(run["eval_accuracy"], 0.2)
    found = summarize_arm([run, curves(0.001)], REGIMES["stale"])
    assert found["reached_target"] == 1 and found["completions_to_target"][0] == 32 * 24
    never = summarize_arm([run], REGIMES["stale"])
    assert "local_kl_to_target" not in never
    assert "| `proma` | 0 of 1 |  |  |  |" in frontier_report.equal_table({"proma": never})


def test_width_counts_half_decades():
    plan = Plan([Block("on_policy", ["reinforce"])])
    records = made_up(plan)
    for run, record in records.items():
        if run.rate == -14:
            record["curves"]["eval_accuracy"] |= dict.fromkeys((32, 36, 40), 0.85)
    # Rates halfway between others do not count
    assert RegimeRuns("on_policy", plan, records).arms()["reinforce"]["rate_decades"] == 1.5


def test_whole_report(tmp_path):
    records = made_up(PROTOCOL)
    text = frontier_report.write_report(PROTOCOL, records, tmp_path)
    assert text == (tmp_path / "tables.md").read_text()
    assert "- `proma` is better than both controls: yes (t-interval: yes)" in text
    assert "- `proma_intra` is better than `reinforce`: no (t-interval: no)" in text
    # Equal runs differ by nothing
    equal = "+0.000 [+0.000, +0.000] | [+0.000, +0.000] | 1.000"
    assert f"| `proma_intra: groups - shuffled` | {equal} | 0.50 | {equal} | 10 |" in text
    assert "### Stale: tuning of the learning rate" in text and "### Stale: tuning of the parameter" in text
    assert "| 2.00e-01 | 2.00e-01 | 2.00e-01 |" in text
    names = {
        f"{kind}_{regime}.{suffix}"
        for kind in ("frontier", "tuning")
        for regime in ("on_policy", "stale")
        for suffix in ("png", "svg")
    }
    assert names | {"frontier_groups.png", "tuning_sgd.png", "summary.json"} <= {p.name for p in tmp_path.iterdir()}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [*summary] == ["on_policy", "groups", "adamw", "sgd", "sgd_test", "stale"]
    assert summary["adamw"]["overlaps"]["proma"]["update_overlap"] == pytest.approx(0.2)
    assert summary["adamw"]["overlaps"]["proma"]["runs"] == 2


def test_a_comparison_that_is_not_complete(tmp_path):
    assert frontier_report.write_report(PROTOCOL, {}, tmp_path) == "\n"
    records = {run: r for run, r in made_up(PROTOCOL).items() if (run.arm, run.seed) != ("proma_random", 109)}
    text = frontier_report.write_report(PROTOCOL, records, tmp_path)
    assert "- `proma` is better than both controls: not complete\n" in text
    assert "- `proma` is better than `reinforce_matched`: yes (t-interval: yes)" in text


def test_where_a_difference_comes_from():
    plan = Plan([Block("on_policy", ["proma", "reinforce"], extends=False)])
    records = made_up(plan)
    summary = summarize(read_regimes(plan, records))["on_policy"]
    pair, regime = summary["pairs"]["proma - reinforce"], REGIMES["on_policy"]
    within = [pair[f"within_{budget:g}"] for budget in regime.budgets]
    assert statistics.fmean(within) == pytest.approx(pair["score"][0])
    # Runs end at a divergence of 0.02 and of 0.04, a little more
    assert [summary["arms"]["proma"][f"never_exceed_{budget:g}"] for budget in regime.budgets] == [0, 0, 0]
    for run, record in records.items():
        if run.arm == "proma" and run.seed in (100, 101):
            record["curves"]["global_kl"] = {step: 0.0004 * step for step in record["curves"]["global_kl"]}
    text = frontier_report.text_of(plan, summarize(read_regimes(plan, records)))
    assert "| `proma` | 10 | 0 | 0 | 2 |" in text and "| all | 20 | 0 | 0 | 2 |" in text


def test_half_of_the_evaluations():
    plan = Plan([Block("on_policy", ["proma", "reinforce"], extends=False)])
    records = made_up(plan)
    for run, record in records.items():
        # PROMA is better at one evaluation alone, and that is not among every second one
        if run.arm == "proma":
            record["curves"]["global_kl"] = {step: 2 * kl for step, kl in record["curves"]["global_kl"].items()}
            record["curves"]["eval_accuracy"][4] = 0.5
    pair = summarize(read_regimes(plan, records))["on_policy"]["pairs"]["proma - reinforce"]
    assert pair["score"][0] > 0.05 and pair["score_every_second"] == pytest.approx(0.0)
    row = frontier_report.budgets_table({"pair": pair}, REGIMES["on_policy"].budgets).splitlines()[2]
    assert row.startswith("| `pair` | +0.1") and row.endswith("| +0.000 [+0.000, +0.000], p 1.000 |")


def test_a_single_seed_has_no_t_interval():
    plan = Plan([Block("on_policy", ["proma", "reinforce"], test_seeds=(100,), extends=False)])
    pair = summarize(read_regimes(plan, made_up(plan)))["on_policy"]["pairs"]["proma - reinforce"]
    assert pair["score_t"] is None and pair["score_p"] == 1.0
    assert "| 1.000 |" in frontier_report.pairs_table({"pair": pair})


def test_tuning():
    plan = Plan([Block("on_policy", ["proma", "isopo", "grpo"])])
    records = made_up(plan)
    for run, record in records.items():
        if (run.arm, run.value) == ("grpo", 2):  # epsilon 0.05
            record["curves"]["eval_accuracy"][0] = 0.4
    for run, record in [*records.items()]:
        if (run.arm, run.value, run.seed) == ("grpo", 0, 100):
            del records[run]
            records[type(run)("on_policy", "grpo", run.rate, 2, 100)] = record
    summary = summarize(read_regimes(plan, records))["on_policy"]
    tuned = summary["tuning"]["grpo"]
    assert [*tuned["rates"]] == ["1e-05", "3.2e-05", "0.0001", "0.00032"] and [*tuned["values"]] == [
        "0.2",
        "0.1",
        "0.05",
    ]
    assert tuned["values"]["0.2"] == pytest.approx(tuned["rates"]["3.2e-05"][0])
    assert tuned["values"]["0.05"] > tuned["values"]["0.1"]
    assert summary["arms"]["grpo"]["parameter"] == "epsilon 0.05" and summary["arms"]["grpo"]["edge"] == "smallest"
    # The first value, and none of numbers
    assert "edge" not in summary["arms"]["proma"] and "edge" not in summary["arms"]["isopo"]
    text = frontier_report.text_of(plan, {"on_policy": summary})
    row = next(line for line in text.splitlines() if line.startswith("| `grpo` |") and "0.05: " in line)
    assert row.startswith("| `grpo` | 3.2e-05 | epsilon 0.05 | 0.2: ") and row.endswith("| smallest |")


def test_report_from_a_file(tmp_path, capsys):
    lines = [
        json.dumps({**vars(run), "seconds": 1.0, "curves": record["curves"]}) + "\n"
        for run, record in made_up(QUICK).items()
    ]
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    arguments = [
        "--runs",
        str(tmp_path / "runs.jsonl.gz"),
        "--output_dir",
        str(tmp_path / "report"),
        "--plan",
        "quick",
    ]
    frontier_report.main(arguments)
    assert "`proma - reinforce_matched`" in capsys.readouterr().out


def test_the_pretrained_model_is_scored_by_its_own_budgets_and_problems():
    records = made_up(PRETRAINED)
    for record in records.values():
        record["curves"]["final_accuracy"] = {40: 0.7}
        record["curves"]["global_kl"] = {step: 0.01 * step for step in record["curves"]["global_kl"]}
    summary = summarize(read_regimes(PRETRAINED, records))["pretrained"]
    proma = summary["arms"]["proma"]
    assert proma["final_accuracy"] == pytest.approx([0.7] * 3) and proma["seeds"] == 6
    # Accuracy 0.2 + step / 40 at a divergence of step / 100, and 0.9 from step 28 on
    assert proma["within_0.2"][0] == pytest.approx(0.7) and proma["within_0.4"][0] == pytest.approx(0.9)
    assert "Within 0.4" in frontier_report.text_of(PRETRAINED, {"pretrained": summary})


@pytest.mark.parametrize(
    ("arm", "curve", "title", "row"),
    [
        ("reinforce_matched", "length_ratio", "lengths of updates", "projection_bound 0.5 | 0.600 [0.600, 0.600] |"),
        ("proma", "removed", "projections", "projection_bound 0.5 | 0.600 [0.600, 0.600] |"),
        ("dppo", "masked", "trust regions", "divergence_threshold 0.15 | 6.0e-01 [6.0e-01, 6.0e-01] |"),
    ],
)
def test_what_some_arms_alone_have(arm, curve, title, row):
    plan = Plan([Block("on_policy", ["reinforce", arm], extends=False)])
    records = made_up(plan)
    for run, record in records.items():
        if run.arm == arm:
            record["curves"][curve] = {1: 0.5, 2: 0.7}
    text = frontier_report.text_of(plan, summarize(read_regimes(plan, records)))
    _, _, table = text.partition(f"{title}\n\n")
    assert table.splitlines()[2:4] == [f"| `{arm}` | 3.2e-05 | {row}", ""]
    assert title not in frontier_report.text_of(plan, summarize(read_regimes(plan, made_up(plan))))
