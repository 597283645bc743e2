"""
The report of recipes/frontier.py, from its runs alone: tables, figures and the numbers behind them.

    python recipes/frontier_report.py --runs results/frontier_cpu/runs.jsonl.gz --output_dir runs/report

Leaves tables.md, summary.json, and for each regime the figures frontier_<regime> and tuning_<regime> as PNG and SVG.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from proma_trl.recipes.frontier_plan import (
    ARMS,
    BUDGETS,
    CONTROLS,
    PROTOCOL,
    QUICK,
    REGIMES,
    TARGET,
    Plan,
    Run,
    read_runs,
)
from proma_trl.tools.curves import Curves
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

Records = Mapping[Run, Mapping[str, Any]]

# Of the budgets that the figures show, between none and twice the largest
_POINTS = 41


def endpoints(run: Curves, completions_a_step: int) -> dict[str, float | None]:
    """What the protocol asks of a run; `None` where it never evaluates at the target."""
    last = max(run["eval_accuracy"])
    reached = step_reaching(run, TARGET)
    found = {"score": frontier_score(run, BUDGETS)}
    found |= {f"within_{budget:g}": accuracy_within(run, budget) for budget in BUDGETS}
    found["final_accuracy"] = final_accuracy(run)
    found["completions_to_target"] = None if reached is None else completions_a_step * reached
    found["local_kl_to_target"] = None if not reached else mean_until(run, "local_kl", reached)
    # Two rollouts are a tenth of a run
    found["entropy_at_target"] = None if not reached else mean_since(run, "entropy", reached, last // 10)
    return found


def summarize_arm(runs: Sequence[Curves], completions_a_step: int) -> dict[str, Any]:
    """Means and intervals of the endpoints over seeds; those at the target over the runs that reach it."""
    found = [endpoints(run, completions_a_step) for run in runs]
    summary = {"seeds": len(runs), "reached_target": sum(e["completions_to_target"] is not None for e in found)}
    for name in found[0]:
        values = [e[name] for e in found if e[name] is not None]
        if values:
            summary[name] = [statistics.fmean(values), *paired_interval(values)]
    return summary


def compare(ours: Sequence[Curves], others: Sequence[Curves], endpoint: Callable[[Curves], float]) -> dict[str, Any]:
    """The paired difference of an endpoint, its interval, and the probability of improvement."""
    x, y = [endpoint(run) for run in ours], [endpoint(run) for run in others]
    differences = [a - b for a, b in zip(x, y, strict=True)]
    return {
        "difference": [statistics.fmean(differences), *paired_interval(differences)],
        "probability_of_improvement": probability_of_improvement(x, y),
        "seeds": len(differences),
    }


def width(tuned: Mapping[int, Sequence[Curves]]) -> float:
    """Decades of learning rates, half a one each, whose mean final accuracy is within two points of the best."""
    means = {rate: statistics.fmean(map(final_accuracy, runs)) for rate, runs in tuned.items()}
    return 0.5 * sum(mean >= max(means.values()) - 0.02 for mean in means.values())


class Compared:
    """The complete runs of one regime: of its tuned arms with the test seeds that all of them have, and of tuning."""

    def __init__(self, name: str, plan: Plan, records: Records):
        self.name = name
        scores = {run: frontier_score(record["curves"], BUDGETS) for run, record in records.items()}
        self.chosen, self.test, self.tuning = {}, {}, {}
        for block in plan.blocks:
            for arm in block.arms if block.regime == name else ():
                point = plan.chosen(block, arm, scores)
                runs = {} if point is None else {seed: block.run(arm, point, seed) for seed in block.test_seeds}
                runs = {seed: records[run]["curves"] for seed, run in runs.items() if run in records}
                if runs:
                    self.chosen[arm], self.test[arm] = point, runs
                # On the grid of half decades, with the parameter's first value
                rates = {run.rate for run in records if (run.regime, run.arm) == (name, arm) and run.rate % 2 == 0}
                for rate in sorted(rates):
                    runs = [block.run(arm, (rate, 0), seed) for seed in block.tuning_seeds]
                    if all(run in records for run in runs):
                        self.tuning.setdefault(arm, {})[rate] = [records[run]["curves"] for run in runs]

    def pairs(self, arm: str, other: str) -> tuple[list[Curves], list[Curves]]:
        """The test runs of two arms with the same seeds."""
        seeds = [seed for seed in self.test[arm] if seed in self.test[other]]
        return [self.test[arm][seed] for seed in seeds], [self.test[other][seed] for seed in seeds]

    def comparisons(self) -> list[tuple[str, str]]:
        """Each arm with REINFORCE and GRPO, and PROMA with its controls."""
        against = {arm: ["reinforce", "grpo"] for arm in self.test}
        against |= {"proma": [*CONTROLS, "reinforce", "grpo"]}
        return [(arm, other) for arm in self.test for other in against[arm] if other in self.test and other != arm]

    def summary(self) -> dict[str, Any]:
        """All numbers of the tables."""
        arms = {}
        for arm, runs in self.test.items():
            run = Run(self.name, arm, *self.chosen[arm], 0)
            setting = {"learning_rate": run.learning_rate}
            if ARMS[arm].parameter:
                setting[ARMS[arm].parameter.removeprefix("--")] = ARMS[arm].values[run.value]
            arms[arm] = {
                **setting,
                "rate_decades": width(self.tuning[arm]),
                **summarize_arm([*runs.values()], REGIMES[self.name].completions_a_step),
            }
        compared = {
            f"{arm} - {other}": compare(*self.pairs(arm, other), lambda run: frontier_score(run, BUDGETS))
            for arm, other in self.comparisons()
        }
        final = {
            f"{arm} - {other}": compare(*self.pairs(arm, other), final_accuracy) for arm, other in self.comparisons()
        }
        return {"arms": arms, "frontier_score": compared, "final_accuracy": final}


def _cell(values: Sequence[float] | None, digits: str = ".3f") -> str:
    if values is None:
        return ""
    mean, low, high = values
    return f"{mean:{digits}} [{low:{digits}}, {high:{digits}}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def tables(regime: str, summary: Mapping[str, Any]) -> str:
    """Three Markdown tables: what was chosen and reached, at equal accuracy, and paired differences."""
    arms, budgets = summary["arms"], [f"within_{budget:g}" for budget in BUDGETS]
    reached = [
        [
            f"`{arm}`",
            f"{found['learning_rate']:g}",
            *[
                f"{found[ARMS[arm].parameter.removeprefix('--')]}" if ARMS[arm].parameter else "",
                f"{found['rate_decades']:g}",
                str(found["seeds"]),
            ],
            *(_cell(found[name]) for name in ("score", *budgets, "final_accuracy")),
        ]
        for arm, found in sorted(arms.items(), key=lambda item: -item[1]["score"][0])
    ]
    header = [
        "Arm",
        "Rate",
        "Parameter",
        "Width",
        "Seeds",
        "Frontier score",
        *(f"Within {b:g}" for b in BUDGETS),
        "Final",
    ]
    equal = [
        [
            f"`{arm}`",
            f"{found['reached_target']} of {found['seeds']}",
            _cell(found.get("completions_to_target"), ".0f"),
            _cell(found.get("local_kl_to_target"), ".1e"),
            _cell(found.get("entropy_at_target")),
        ]
        for arm, found in arms.items()
    ]
    differences = [
        [
            f"`{name}`",
            _cell(found["difference"], "+.3f"),
            f"{found['probability_of_improvement']:.2f}",
            _cell(summary["final_accuracy"][name]["difference"], "+.3f"),
            str(found["seeds"]),
        ]
        for name, found in summary["frontier_score"].items()
    ]
    return "\n\n".join(
        [
            f"### {regime}: what each arm reaches",
            _table(header, reached),
            f"### {regime}: at an accuracy of {TARGET:g}",
            _table(["Arm", "Runs", "Completions", "Local KL until then", "Entropy"], equal),
            f"### {regime}: paired differences",
            _table(["Pair", "Frontier score", "Probability of improvement", "Final accuracy", "Seeds"], differences),
        ]
    )


def write_report(plan: Plan, records: Records, output: Path) -> str:
    """Writes the report of the runs that are complete. Returns its tables."""
    texts, summaries = [], {}
    budgets = [2 * max(BUDGETS) * i / (_POINTS - 1) for i in range(_POINTS)]
    for name in dict.fromkeys(block.regime for block in plan.blocks):
        regime = Compared(name, plan, records)
        if regime.tuning:
            scores = {
                arm: {
                    Run(name, arm, rate, 0, 0).learning_rate: statistics.fmean(
                        frontier_score(run, BUDGETS) for run in runs
                    )
                    for rate, runs in rates.items()
                }
                for arm, rates in regime.tuning.items()
            }
            draw_tuning(scores, output / f"tuning_{name}")
        if regime.test:
            summaries[name] = regime.summary()
            texts.append(tables(name, summaries[name]))
            values = {
                arm: [[accuracy_within(run, budget) for run in runs.values()] for budget in budgets]
                for arm, runs in regime.test.items()
            }
            bands = {
                arm: [[statistics.fmean(v), *paired_interval(v, resamples=2000)] for v in of_budgets]
                for arm, of_budgets in values.items()
            }
            draw_frontiers(budgets, bands, output / f"frontier_{name}")
    (output / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n")
    text = "\n\n".join(texts) + "\n"
    (output / "tables.md").write_text(text)
    return text


def main(arguments: list[str]) -> None:
    """Parses the options, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="runs.jsonl or runs.jsonl.gz")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the runs are those of the quick version")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(write_report(QUICK if args.quick else PROTOCOL, read_runs(args.runs), args.output_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
