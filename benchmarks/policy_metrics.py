"""
What PolicyMetrics costs: optimizer steps that it measures beside steps of the same run that it does not.

    python benchmarks/policy_metrics.py
    python benchmarks/policy_metrics.py --hidden 576 --vocabulary 49152 --lengths 128 --microbatches 2

PROMATrainer trains with generation, and every other step is measured, after two steps that warm up. Figures are
medians, and the median ratio of neighbouring steps. `--lengths` are here tokens a completion; the prompt is a single
one. It takes the arguments of `step_time.py`.
"""

import statistics
import tempfile
import time

import step_time
from transformers import TrainerCallback

from proma_trl import PROMAConfig, PROMATrainer
from proma_trl.tools.policy_metrics import PolicyMetrics

WAYS = {
    "kl/local": {"initial": False},
    "kl/local, kl/global": {},
    "kl/local, kl/global, exact": {"exact": True},
}


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, what other callbacks do at its end included."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._start)


def measure(arguments, length, options):
    """Seconds of steps without and with a measurement, in the order of the run, without those that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_time.make_trainer(
            PROMATrainer,
            PROMAConfig,
            arguments,
            length,
            folder,
            prepare=False,
            max_steps=2 + 2 * arguments.repeats,
            projection=arguments.projection,
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        stopwatch = Stopwatch()
        trainer.add_callback(PolicyMetrics(trainer, every_steps=2, **options))
        trainer.add_callback(stopwatch)
        trainer.train()
    return stopwatch.seconds[2::2], stopwatch.seconds[3::2]


def main() -> None:
    parser = step_time.make_parser()
    parser.description = __doc__
    arguments = parser.parse_args()
    results = []
    print(f"{'T':>6} {'step s':>9} {'with s':>9} {'ratio':>7}  measured")
    for length in arguments.lengths:
        for name, options in WAYS.items():
            without, measured = measure(arguments, length, options)
            result = {
                "length": length,
                "measured": name,
                "step_seconds": statistics.median(without),
                "measured_step_seconds": statistics.median(measured),
                "ratio": statistics.median(m / w for m, w in zip(measured, without, strict=True)),
            }
            results.append(result)
            print(
                f"{length:>6} {result['step_seconds']:>9.3f} {result['measured_step_seconds']:>9.3f} "
                f"{result['ratio']:>7.3f}  {name}",
                flush=True,
            )
    step_time.write(arguments, results)


if __name__ == "__main__":
    main()
