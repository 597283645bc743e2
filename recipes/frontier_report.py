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
    "removed": ("projections", "Length that is removed, by that of what was accumulated", ".3f"),
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


def never_table(arms: Mapping[str, Mapping[str, Any]], budgets: Sequence[float]) -> str:
    """How many runs stay within a budget to their end, and count there with their last evaluation."""
    columns = ("seeds", *(f"never_exceed_{budget:g}" for budget in budgets))
    rows = [[f"`{arm}`", *(str(found[name]) for name in columns)] for arm, found in arms.items()]
    rows.append(["all", *(str(sum(found[name] for found in arms.values())) for name in columns)])
    return _table(["Arm", "Runs", *(f"Never exceed {budget:g}" for budget in budgets)], rows)


def tuning_table(tuning: Mapping[str, Mapping[str, Any]]) -> str:
    """What arms reach at each learning rate, with their parameters at their first values."""
    rates = sorted({rate for found in tuning.values() for rate in found["rates"]}, key=float)

    def cell(values: Sequence[float] | None) -> str:
        return "" if values is None else f"{values[0]:.3f}, {values[1]:.3f}"

    rows = [[f"`{arm}`", *(cell(found["rates"].get(rate)) for rate in rates)] for arm, found in tuning.items()]
    return _table(["Arm", *rates], rows)


def values_table(tuning: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of the values of arms' parameters."""
    rows = []
    for arm, found in tuning.items():
        if len(found["values"]) > 1:
            scores = ", ".join(f"{value}: {mean:.3f}" for value, mean in found["values"].items())
            rows.append([f"`{arm}`", *_setting(arms[arm]), scores, arms[arm].get("edge", "")])
    return _table(["Arm", "Rate", "Tested with", "Scores in tuning", "Of those tried"], rows) if rows else ""


def _difference(found: Mapping[str, Any], name: str) -> list[str]:
    interval = found[f"{name}_t"]
    return [
        _cell(found[name], "+.3f"),
        "" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]",
        f"{found[f'{name}_p']:.3f}",
    ]


def pairs_table(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """Paired differences, with bootstrap intervals, t-intervals and the p-values of sign flips."""
    rows = [
        [
            f"`{name}`",
            *_difference(found, "score"),
            f"{found['probability_of_improvement']:.2f}",
            *_difference(found, "final_accuracy"),
            str(found["seeds"]),
        ]
        for name, found in pairs.items()
    ]
    statistics_of = ("t-interval", "p")
    header = ["Pair", "Frontier score", *statistics_of, "Probability of improvement", "Final accuracy"]
    return _table([*header, *statistics_of, "Seeds"], rows)


def budgets_table(pairs: Mapping[str, Mapping[str, Any]], budgets: Sequence[float]) -> str:
    """Where a difference in the score comes from, and whether it needs all evaluations: t-intervals and p-values."""

    def cell(found: Mapping[str, Any], name: str) -> str:
        interval = found[f"{name}_t"]
        within = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
        return f"{found[name]:+.3f}{within}, p {found[f'{name}_p']:.3f}"

    names = (*(f"within_{budget:g}" for budget in budgets), "score_every_second")
    rows = [[f"`{pair}`", *(cell(found, name) for name in names)] for pair, found in pairs.items()]
    header = ["Pair", *(f"Within {budget:g}" for budget in budgets), "Score of every second evaluation"]
    return _table(header, rows)


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
    """The protocol's criteria, which the nearly on-policy pairs decide: by bootstrap intervals, and by t-intervals."""

    def lower_ends(name: str) -> tuple[float, float] | None:
        found = pairs.get(name)
        if found is None or found["seeds"] < seeds or found["score_t"] is None:  # one seed has no t-interval
            return None
        return found["score"][1], found["score_t"][0]

    def verdict(names: Sequence[str]) -> str:
        lows = [low for low in map(lower_ends, names) if low is not None]
        if len(lows) < len(names):
            return "not complete"
        bootstrap, t = (["no", "yes"][min(ends) > 0] for ends in zip(*lows, strict=True))
        return f"{bootstrap} (t-interval: {t})"

    lines = [f"- `proma` is better than both controls: {verdict([f'proma - {control}' for control in CONTROLS])}"]
    lines += [
        f"- `{name.replace(' - ', '` is better than `')}`: {verdict([name])}"
        for name in pairs
        if name.endswith((" - reinforce", *CONTROLS))
    ]
    return "\n".join(lines)


def text_of(plan: Plan, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    parts = []
    for name, regime in summary.items():
        title, budgets = _REGIMES[name], REGIMES[name].budgets
        arms, pairs, tuning = (regime.get(key, {}) for key in ("arms", "pairs", "tuning"))
        parts.append(f"## {title}")
        parts.append(overlaps_table(regime["overlaps"]) if "overlaps" in regime else arms_table(arms, budgets))
        if arms:
            parts += [f"### {title}: at an accuracy of {REGIMES[name].target:g}", equal_table(arms)]
            parts += [f"### {title}: runs that never exceed a budget", never_table(arms, budgets)]
        for own, (heading, column, digits) in _OWN_TABLES.items():
            table = own_table(arms, own, column, digits)
            if table:
                parts += [f"### {title}: {heading}", table]
        if pairs:
            parts += [f"### {title}: paired differences", pairs_table(pairs)]
            parts += [f"### {title}: paired differences by budget", budgets_table(pairs, budgets)]
        if tuning:
            parts += [f"### {title}: tuning of the learning rate", tuning_table(tuning)]
            values = values_table(tuning, arms or regime["overlaps"])
            if values:
                parts += [f"### {title}: tuning of the parameter", values]
        if name == "on_policy":
            parts += ["### The criteria", verdicts(pairs, len(plan.blocks[0].test_seeds))]
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
