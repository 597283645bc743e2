"""
Step time of PROMATrainer beside GRPOTrainer's: one optimizer step without generation.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --algorithm proma_intra proma_both
    python benchmarks/step_time.py --hidden 576 --vocabulary 49152 --lengths 256 --output step_time.json

All trainers live in one process and take turns; figures are medians of each and the median ratio of the turns.
None samples: completions are random tokens, so that a step is forward and backward passes of every microbatch,
gradient clipping and the optimizer. With `--projection none`, PROMATrainer has no hooks and the ratio is noise.
"""

import statistics
from functools import partial

from common import (
    make_microbatches,
    make_parser,
    make_prepared_trainer,
    median_ratio,
    method_settings,
    step,
    take_turns,
    write,
)
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    results = []
    print(f"{'T':>6} {'algorithm':>12} {'seconds':>9} {'ratio':>7} {'peak GiB':>9}")
    for length in arguments.lengths:
        trainers = {"grpo": make_prepared_trainer(GRPOTrainer, GRPOConfig, arguments, length)}
        for algorithm in arguments.algorithm:
            settings = method_settings(arguments, algorithm)
            trainers[algorithm] = make_prepared_trainer(PROMATrainer, PROMAConfig, arguments, length, **settings)
        microbatches = make_microbatches(arguments, length)
        steps = {name: partial(step, trainer, microbatches, arguments.device) for name, trainer in trainers.items()}
        taken = take_turns(steps, arguments.repeats)
        seconds = {name: [elapsed for elapsed, _ in turns] for name, turns in taken.items()}
        for name, turns in taken.items():
            result = {
                "length": length,
                "algorithm": name,
                "seconds": statistics.median(seconds[name]),
                "ratio": median_ratio(seconds[name], seconds["grpo"]),
                "peak_bytes": max(peak for _, peak in turns),
            }
            results.append(result)
            print(
                f"{length:>6} {name:>12} {result['seconds']:>9.3f} {result['ratio']:>7.3f} "
                f"{result['peak_bytes'] / 2**30:>9.2f}",
                flush=True,
            )
    write(arguments, results)


if __name__ == "__main__":
    main()
