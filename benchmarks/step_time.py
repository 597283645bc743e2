"""
Step time of PROMATrainer beside GRPOTrainer's: one optimizer step without generation.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --hidden 576 --vocabulary 49152 --lengths 256 --output step_time.json

Both trainers live in one process and take turns; figures are medians of each and the median ratio of the pairs.
Neither samples: completions are random tokens, so that a step is forward and backward passes of every microbatch,
gradient clipping and the optimizer. With `--projection none`, PROMATrainer has no hooks and the ratio is noise.
"""

import statistics
from functools import partial

from common import (
    make_microbatches,
    make_parser,
    make_prepared_trainer,
    median_ratio,
    projection_settings,
    step,
    take_turns,
    write,
)
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    results = []
    print(f"{'T':>6} {'GRPO s':>9} {'PROMA s':>9} {'ratio':>7} {'GRPO GiB':>9} {'PROMA GiB':>9}")
    for length in arguments.lengths:
        settings = projection_settings(arguments)
        trainers = {
            "grpo": make_prepared_trainer(GRPOTrainer, GRPOConfig, arguments, length),
            "proma": make_prepared_trainer(PROMATrainer, PROMAConfig, arguments, length, **settings),
        }
        microbatches = make_microbatches(arguments, length)
        steps = {name: partial(step, trainer, microbatches, arguments.device) for name, trainer in trainers.items()}
        taken = take_turns(steps, arguments.repeats)
        seconds = {name: [elapsed for elapsed, _ in turns] for name, turns in taken.items()}
        peaks = {name: max(peak for _, peak in turns) for name, turns in taken.items()}
        result = {
            "length": length,
            "grpo_seconds": statistics.median(seconds["grpo"]),
            "proma_seconds": statistics.median(seconds["proma"]),
            "ratio": median_ratio(seconds["proma"], seconds["grpo"]),
            "grpo_peak_bytes": peaks["grpo"],
            "proma_peak_bytes": peaks["proma"],
        }
        results.append(result)
        print(
            f"{length:>6} {result['grpo_seconds']:>9.3f} {result['proma_seconds']:>9.3f} {result['ratio']:>7.3f} "
            f"{peaks['grpo'] / 2**30:>9.2f} {peaks['proma'] / 2**30:>9.2f}",
            flush=True,
        )
    write(arguments, results)


if __name__ == "__main__":
    main()
