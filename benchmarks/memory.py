"""
Peak memory of PROMATrainer beside GRPOTrainer's, for the same optimizer steps as in `step_time.py`.

    python benchmarks/memory.py --lengths 256
    python benchmarks/memory.py --hidden 576 --vocabulary 49152 --lengths 256 --budget 0.25

Each trainer has a process of its own. On a CPU the figure is the process's peak resident memory after the steps, with
that before the first step taken off. Freed tensors go back to the system at once (by glibc's settings below), so that
it is what was alive at one time, and not what the heap has kept. On CUDA it is the allocator's peak during a step. It
takes the options of `step_time.py`.
"""

import argparse
import json
import os
import subprocess
import sys

from common import (
    ALGORITHMS,
    make_microbatches,
    make_parser,
    make_prepared_trainer,
    method_settings,
    peak_resident_bytes,
    step,
    write,
)
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer


def measure(arguments: argparse.Namespace, length: int) -> int:
    """Peak bytes of two optimizer steps of `arguments.worker`, in this process."""
    if arguments.worker == "grpo":
        trainer = make_prepared_trainer(GRPOTrainer, GRPOConfig, arguments, length)
    else:
        settings = method_settings(arguments, arguments.worker)
        trainer = make_prepared_trainer(PROMATrainer, PROMAConfig, arguments, length, **settings)
    microbatches = make_microbatches(arguments, length)
    before = peak_resident_bytes()
    peak = max(step(trainer, microbatches, arguments.device)[1] for _ in range(2))
    return peak if arguments.device == "cuda" else peak_resident_bytes() - before


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--worker", choices=["grpo", *ALGORITHMS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps({str(length): measure(arguments, length) for length in arguments.lengths}))
        return

    results = []
    print(f"{'T':>6} {'algorithm':>12} {'GiB':>9} {'ratio':>7}")
    for length in arguments.lengths:
        peaks = {}
        for algorithm in ("grpo", *arguments.algorithm):
            command = [sys.executable, *sys.argv, "--lengths", str(length), "--worker", algorithm]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            peaks[algorithm] = json.loads(run.stdout.splitlines()[-1])[str(length)]
            ratio = peaks[algorithm] / peaks["grpo"]
            results.append({"length": length, "algorithm": algorithm, "peak_bytes": peaks[algorithm], "ratio": ratio})
            print(f"{length:>6} {algorithm:>12} {peaks[algorithm] / 2**30:>9.3f} {ratio:>7.3f}", flush=True)
    write(arguments, results)


if __name__ == "__main__":
    main()
