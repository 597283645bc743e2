"""
What PolicyMetrics costs: optimizer steps that it measures beside steps of the same run that it does not.

    python benchmarks/policy_metrics.py
    python benchmarks/policy_metrics.py --hidden 576 --vocabulary 49152 --lengths 128 --microbatches 2

PROMATrainer trains with generation, and every other step is measured, after two steps that warm up. Figures are
medians, and the median ratio of neighbouring steps. `--lengths` are tokens per completion here; the prompt is a single
token. It takes the options of `step_time.py`.
"""

import argparse
import statistics
import tempfile
from typing import Any

from common import QUIET, Stopwatch, make_parser, make_trainer, median_ratio, method_settings, write

from proma_trl import PROMAConfig, PROMATrainer
from proma_trl.tools.policy_metrics import PolicyMetrics

# Options of `PolicyMetrics` by what it then measures
MEASUREMENTS = {
    "kl/local": {"initial": False},
    "kl/local, kl/global": {},
    "kl/local, kl/global, exact": {"exact": True},
}


def measure(arguments: argparse.Namespace, length: int, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with a measurement, in the order of the run, without those that warm up."""
    settings = method_settings(arguments, "proma") | QUIET | {"max_steps": 2 + 2 * arguments.repeats}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(PROMATrainer, PROMAConfig, arguments, length, folder, **settings)
        stopwatch = Stopwatch(arguments.device)
        trainer.add_callback(PolicyMetrics(trainer, every_steps=2, **options))
        trainer.add_callback(stopwatch)
        trainer.train()
    return stopwatch.seconds[2::2], stopwatch.seconds[3::2]


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    results = []
    print(f"{'T':>6} {'step s':>9} {'with s':>9} {'ratio':>7}  measured")
    for length in arguments.lengths:
        for name, options in MEASUREMENTS.items():
            without, measured = measure(arguments, length, options)
            result = {
                "length": length,
                "measured": name,
                "step_seconds": statistics.median(without),
                "measured_step_seconds": statistics.median(measured),
                "ratio": median_ratio(measured, without),
            }
            results.append(result)
            print(
                f"{length:>6} {result['step_seconds']:>9.3f} {result['measured_step_seconds']:>9.3f} "
                f"{result['ratio']:>7.3f}  {name}",
                flush=True,
            )
    write(arguments, results)


if __name__ == "__main__":
    main()
