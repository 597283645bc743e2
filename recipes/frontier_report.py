"""
The report of recipes/frontier.py, from its runs alone: tables, verdicts, figures and the numbers behind them.

    python recipes/frontier_report.py --runs results/frontier_cpu/runs.jsonl.gz --output_dir runs/report

Leaves tables.md, summary.json, and for each regime the figures frontier_<regime> and tuning_<regime> as PNG and SVG.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proma_trl.recipes.frontier_plan import CONTROLS, PRETRAINED, PROTOCOL, QUICK, REGIMES, Plan, Run, read_runs
from proma_trl.recipes.frontier_summary import Records, RegimeRuns, read_regimes, score, summarize
from proma_trl.tools.figures import draw_frontiers, draw_tuning
from proma_trl.tools.frontiers import accuracy_within, paired_interval

_REGIMES = {
    "on_policy": "Nearly on-policy",
    "stale": "Stale",
    "groups": "Microbatches of whole groups",
    "adamw": "What AdamW leaves of the projection",
    "sgd": "What SGD leaves of the projection",
    "sgd_test": "Nearly on-policy, with SGD",
    "pretrained": "A pretrained model",
}
# Of each of OWN_CURVES, the table's title, its column and the format of its numbers
_OWN_TABLES = {
    "length_ratio": ("lengths of updates", "Length of its updates, by REINFORCE's", ".3f"),
    "masked": ("trust regions", "Fraction of tokens that it masks", ".1e"),
}
# Of the budgets that the figures show, between none and twice the largest
_POINTS = 41


def _cell(values: Sequence[float] | None, digits: str = ".3f") -> str:
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:{digits}} [{low:{digits}}, {high:{digits}}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _setting(found: Mapping[str, Any]) -> list[str]:
    return [f"{found['learning_rate']:g}", found.get("parameter", "")]


def arms_table(arms: Mapping[str, Mapping[str, Any]], budgets: Sequence[float]) -> str:
    """What each arm reaches, the best first."""
    rows = [
        [
            f"`{arm}`",
            *_setting(found),
            f"{found['rate_decades']:g}" if "rate_decades" in found else "",
            str(found["seeds"]),
            *(
                _cell(found[name])
                for name in ("score", *(f"within_{budget:g}" for budget in budgets), "final_accuracy")
            ),
        ]
        for arm, found in sorted(arms.items(), key=lambda item: -item[1]["score"][0])
    ]
    header = ["Arm", "Rate", "Parameter", "Width", "Seeds", "Frontier score"]
    return _table([*header, *(f"Within {budget:g}" for budget in budgets), "Final accuracy"], rows)


def equal_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The endpoints at equal accuracy."""
    rows = [
        [
            f"`{arm}`",
            f"{found['reached_target']} of {found['seeds']}",
            _cell(found.get("completions_to_target"), ".0f"),
            _cell(found.get("local_kl_to_target"), ".1e"),
            _cell(found.get("entropy_at_target")),
        ]
        for arm, found in arms.items()
    ]
    return _table(["Arm", "Runs that reach it", "Completions", "Local KL until then", "Entropy"], rows)


def own_table(arms: Mapping[str, Mapping[str, Any]], name: str, column: str, digits: str) -> str:
    """An endpoint that some arms have, of these."""
    rows = [[f"`{arm}`", *_setting(found), _cell(found[name], digits)] for arm, found in arms.items() if name in found]
    return _table(["Arm", "Rate", "Parameter", column], rows) if rows else ""


def pairs_table(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """Paired differences."""
    rows = [
        [
            f"`{name}`",
            _cell(found["score"], "+.3f"),
            f"{found['probability_of_improvement']:.2f}",
            _cell(found["final_accuracy"], "+.3f"),
            str(found["seeds"]),
        ]
        for name, found in pairs.items()
    ]
    return _table(["Pair", "Frontier score", "Probability of improvement", "Final accuracy", "Seeds"], rows)


def overlaps_table(overlaps: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean squared cosines between parameter updates and sequences' gradients."""
    names = ("update_overlap", "update_tensor_overlap", "update_last_tensor_overlap")
    rows = [
        [
            f"`{arm}`",
            *_setting(found),
            str(found["runs"]),
            f"{found['score']:.3f}",
            *(f"{found[name]:.2e}" for name in names),
        ]
        for arm, found in overlaps.items()
    ]
    header = ["Arm", "Rate", "Parameter", "Runs", "Frontier score"]
    return _table([*header, "All parameters", "By tensor", "By tensor, last microbatch"], rows)


def verdicts(pairs: Mapping[str, Mapping[str, Any]], seeds: int) -> str:
    """The protocol's criteria, which the nearly on-policy pairs decide."""

    def passes(name: str) -> bool | None:
        found = pairs.get(name)
        return None if found is None or found["seeds"] < seeds else found["score"][1] > 0

    words = {True: "yes", False: "no", None: "not complete"}
    controls = [passes(f"proma - {control}") for control in CONTROLS]
    both = None if None in controls else all(controls)
    lines = [f"- `proma` is better than both controls: {words[both]}"]
    lines += [
        f"- `{name.replace(' - ', '` is better than `')}`: {words[passes(name)]}"
        for name in pairs
        if name.endswith((" - reinforce", *CONTROLS))
    ]
    return "\n".join(lines)


def text_of(plan: Plan, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    parts = []
    for name, regime in summary.items():
        title = _REGIMES[name]
        if "overlaps" in regime:
            parts += [f"## {title}", overlaps_table(regime["overlaps"])]
            continue
        parts += [f"## {title}", arms_table(regime["arms"], REGIMES[name].budgets)]
        parts += [f"### {title}: at an accuracy of {REGIMES[name].target:g}", equal_table(regime["arms"])]
        for own, (heading, column, digits) in _OWN_TABLES.items():
            table = own_table(regime["arms"], own, column, digits)
            if table:
                parts += [f"### {title}: {heading}", table]
        if regime["pairs"]:
            parts += [f"### {title}: paired differences", pairs_table(regime["pairs"])]
        if name == "on_policy":
            parts += ["### The criteria", verdicts(regime["pairs"], len(plan.blocks[0].test_seeds))]
    return "\n\n".join(parts) + "\n"


def draw(regime: RegimeRuns, output: Path) -> None:
    """Draws tuning, and accuracy within budgets where there is a test."""
    if regime.tuning:
        scores = {
            arm: {
                Run(regime.name, arm, rate, 0, 0).learning_rate: statistics.fmean(
                    score(run, regime.regime) for run in runs
                )
                for rate, runs in rates.items()
            }
            for arm, rates in regime.tuning.items()
        }
        draw_tuning(scores, output / f"tuning_{regime.name}")
    if regime.test and regime.is_test:
        budgets = [2 * max(regime.regime.budgets) * i / (_POINTS - 1) for i in range(_POINTS)]
        bands = {}
        for arm, runs in regime.test.items():
            values = [[accuracy_within(run, budget) for run in runs.values()] for budget in budgets]
            bands[arm] = [(statistics.fmean(v), *paired_interval(v, resamples=2000)) for v in values]
        draw_frontiers(budgets, bands, output / f"frontier_{regime.name}")


def write_report(plan: Plan, records: Records, output: Path) -> str:
    """Writes the report of the runs that are complete. Returns its tables."""
    regimes = read_regimes(plan, records)
    for regime in regimes.values():
        draw(regime, output)
    summary = summarize(regimes)
    text = text_of(plan, summary)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / "tables.md").write_text(text)
    return text


def main(arguments: list[str]) -> None:
    """Parses the options, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="runs.jsonl or runs.jsonl.gz")
    parser.add_argument("--output_dir", type=Path, required=True)
    plans = {"protocol": PROTOCOL, "pretrained": PRETRAINED, "quick": QUICK}
    parser.add_argument("--plan", choices=plans, default="protocol", help="which comparison the runs are of")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(write_report(plans[args.plan], read_runs(args.runs), args.output_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
