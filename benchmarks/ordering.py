"""
Whether it matters to learning that sequences of similar length share a microbatch (`order_by_length`).

    python benchmarks/ordering.py --output_dir runs/ordering

The built-in task and the nearly on-policy setting of docs/protocol.md, each method at the learning rate and parameter
that its tuning there chose, with seeds that were not used there. Runs are paired: a seed with TRL's microbatches, and
with ordered ones. It goes on from where it was, and writes `runs.jsonl` and a table.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from proma_trl.recipes.frontier import embedded_task, execute
from proma_trl.recipes.frontier_plan import ARMS, REGIMES, Run
from proma_trl.tools.frontiers import final_accuracy, frontier_score, paired_interval, paired_t_interval, sign_flip_p

SHUFFLED, ORDERED = "on_policy", "ordered"
SEEDS = (300, 301, 302, 303, 304)
# A learning rate in quarters of a decade, 3.2e-5, and the parameter's value
METHODS = {"proma": 0.25, "proma_intra": 10, "reinforce": None}
RATE = -18


def planned() -> Iterator[Run]:
    """All runs, one seed after another."""
    for seed in SEEDS:
        for method, value in METHODS.items():
            place = 0 if value is None else ARMS[method].values.index(value)
            for regime in (SHUFFLED, ORDERED):
                yield Run(regime, method, RATE, place, seed)


def measures(curves: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The endpoints of a run."""
    curves = {name: {int(step): value for step, value in curve.items()} for name, curve in curves.items()}
    last = max(curves["global_kl"])
    return {
        "frontier score": frontier_score(curves, REGIMES[SHUFFLED].budgets),
        "final accuracy": final_accuracy(curves),
        "KL from the initial policy": curves["global_kl"][last],
        "entropy": statistics.fmean(list(curves["entropy"].values())[-4:]),
    }


def table(records: list[dict]) -> str:
    """Means of both, and ordered minus shuffled with a bootstrap and a t-interval, as Markdown."""
    found = {(r["arm"], r["regime"], r["seed"]): measures(r["curves"]) for r in records}
    lines = [
        "| Method | Measure | Seeds | TRL's microbatches | Ordered by length | Difference | t-interval | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        seeds = [s for s in SEEDS if all((method, regime, s) in found for regime in (SHUFFLED, ORDERED))]
        if len(seeds) < 2:
            continue
        for name in found[method, ORDERED, seeds[0]]:
            before, after = ([found[method, regime, s][name] for s in seeds] for regime in (SHUFFLED, ORDERED))
            differences = [b - a for a, b in zip(before, after, strict=True)]
            boot, t = ("[{:+.4f}, {:+.4f}]".format(*f(differences)) for f in (paired_interval, paired_t_interval))
            mean = statistics.fmean
            lines.append(
                f"| {method} | {name} | {len(seeds)} | {mean(before):.4f} | {mean(after):.4f} "
                f"| {mean(differences):+.4f} {boot} | {t} | {sign_flip_p(differences):.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ordering"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--report", type=Path, help="only print the table of a runs.jsonl")
    args = parser.parse_args()
    if args.report is not None:
        print(table([json.loads(line) for line in args.report.read_text().splitlines()]))
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "runs.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(r["regime"], r["arm"], r["seed"]) for r in records}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    options = embedded_task(args.output_dir / "task")
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [run for run in planned() if (run.regime, run.arm, run.seed) not in done]
        futures = {pool.submit(execute, run, args.output_dir / run.name, options): run for run in waiting}
        for future in as_completed(futures):
            records.append(future.result())
            with path.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(f"{len(records)} of {len(list(planned()))}: {futures[future].name}, {records[-1]['seconds']} s")
    text = table(records)
    (args.output_dir / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
