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
    make_microbatches,
    make_parser,
    make_prepared_trainer,
    peak_resident_bytes,
    projection_settings,
    step,
    write,
)
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer


def measure(arguments: argparse.Namespace, length: int) -> int:
    """Peak bytes of two optimizer steps, in this process."""
    if arguments.algorithm == "proma":
        settings = projection_settings(arguments)
        trainer = make_prepared_trainer(PROMATrainer, PROMAConfig, arguments, length, **settings)
    else:
        trainer = make_prepared_trainer(GRPOTrainer, GRPOConfig, arguments, length)
    microbatches = make_microbatches(arguments, length)
    before = peak_resident_bytes()
    peak = max(step(trainer, microbatches, arguments.device)[1] for _ in range(2))
    return peak if arguments.device == "cuda" else peak_resident_bytes() - before


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--algorithm", choices=["grpo", "proma"], help="measure only this, in this process")
    arguments = parser.parse_args()
    if arguments.algorithm is not None:
        print(json.dumps({str(length): measure(arguments, length) for length in arguments.lengths}))
        return

    results = []
    print(f"{'T':>6} {'GRPO GiB':>9} {'PROMA GiB':>9} {'ratio':>7}")
    for length in arguments.lengths:
        peaks = {}
        for algorithm in ("grpo", "proma"):
            command = [sys.executable, *sys.argv, "--lengths", str(length), "--algorithm", algorithm]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            peaks[algorithm] = json.loads(run.stdout.splitlines()[-1])[str(length)]
        grpo, proma = peaks["grpo"], peaks["proma"]
        results.append({"length": length, "grpo_peak_bytes": grpo, "proma_peak_bytes": proma})
        print(f"{length:>6} {grpo / 2**30:>9.3f} {proma / 2**30:>9.3f} {proma / grpo:>7.3f}", flush=True)
    write(arguments, results)


if __name__ == "__main__":
    main()
