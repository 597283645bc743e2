"""
Step time of PROMATrainer beside GRPOTrainer's: one optimizer step without generation.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --algorithm proma_intra proma_both
    python benchmarks/step_time.py --hidden 576 --vocabulary 49152 --lengths 256 --output step_time.json
    python benchmarks/step_time.py --lengths lognormal:180:0.6:1024 --algorithm proma proma_intra
    python benchmarks/step_time.py --lengths lognormal:60:0.8:384 --algorithm reinforce dppo --zero-advantages 0 0.5

All trainers live in one process and take turns; figures are medians of each and the median ratio of the turns.
None samples: completions are random tokens, so that a step is forward and backward passes of every microbatch,
gradient clipping and the optimizer. With `--projection none`, PROMATrainer has no hooks and the ratio is noise.

A number of tokens, `--lengths 256`, stands for rectangles: microbatches that TRL's loss is given as they are. With a
distribution, `--lengths lognormal:MEDIAN:SIGMA:CAP` for completions and `--prompt-lengths` for prompts, trainers are
given rollouts. TRL pads, shuffles and splits them, GRPOTrainer runs them so, and the other trainers run them in each
`--layout`. Then `positions` are those that the model runs on in all forward passes of a step, for each real token. A
step is still without generation and rewards.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from common import DPPO, REFERENCE, make_algorithm_trainer, make_microbatches, median_ratio, step, take_turns, write
from lengths import Lengths
from rollouts import Turn, make_rollout_parser, make_rollout_steps, rollout_variants


def rectangle_steps(arguments: argparse.Namespace, length: int) -> dict[tuple, Callable[[], Turn]]:
    """Steps of each algorithm on microbatches of one length."""
    microbatches = make_microbatches(arguments, length)

    def turn(trainer: Any) -> Turn:
        return Turn(*step(trainer, microbatches, arguments.device), positions=None)

    algorithms = (REFERENCE, *arguments.algorithm)
    return {(name,): partial(turn, make_algorithm_trainer(arguments, length, name)) for name in algorithms}


def rollout_steps(arguments: argparse.Namespace, lengths: Lengths) -> dict[tuple, Callable[[], Turn]]:
    """Steps of each algorithm, layout and part of zero advantages on rollouts."""
    return {
        (algorithm, layout, zero): make_rollout_steps(arguments, lengths, algorithm, layout, zero, **settings)
        for algorithm, layout, zero, settings in rollout_variants(arguments)
    }


def result(lengths: int | Lengths, key: tuple, turns: list[Turn], reference: list[Turn]) -> Mapping[str, Any]:
    """What is written of an algorithm's turns."""
    seconds = [turn.seconds for turn in turns]
    found = {
        "length": lengths if isinstance(lengths, int) else str(lengths),
        **dict(zip(("algorithm", "layout", "zero_advantages"), key, strict=False)),
        "seconds": statistics.median(seconds),
        "ratio": median_ratio(seconds, [turn.seconds for turn in reference]),
        "peak_bytes": max(turn.peak for turn in turns),
    }
    if turns[0].positions is not None:
        found["positions"] = statistics.mean(turn.positions for turn in turns)
    return found


def main() -> None:
    parser = make_rollout_parser(__doc__)
    arguments = parser.parse_args()
    if DPPO in arguments.algorithm and any(isinstance(length, int) for length in arguments.lengths):
        parser.error("dppo needs a rollout: give --lengths as a distribution, such as constant:256")
    results = []
    columns = f"{'algorithm':>12} {'layout':>9} {'zero':>5} {'seconds':>9} {'ratio':>7} {'positions':>10}"
    print(f"{'T':>24} {columns} {'peak GiB':>9}")
    for length in arguments.lengths:
        steps = (rectangle_steps if isinstance(length, int) else rollout_steps)(arguments, length)
        taken = take_turns(steps, arguments.repeats)
        reference = next(iter(taken.values()))
        for key, turns in taken.items():
            row = result(length, key, turns, reference)
            results.append(row)
            algorithm, layout, zero, *_ = (*key, "", "")
            positions = f"{row['positions']:.2f}" if "positions" in row else ""
            print(
                f"{length!s:>24} {algorithm:>12} {layout:>9} {zero:>5} {row['seconds']:>9.3f} {row['ratio']:>7.3f} "
                f"{positions:>10} {row['peak_bytes'] / 2**30:>9.2f}",
                flush=True,
            )
    write(arguments, results)


if __name__ == "__main__":
    main()
