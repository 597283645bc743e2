"""
Peak memory of PROMATrainer beside GRPOTrainer's, for the same optimizer steps as in `step_time.py`.

    python benchmarks/memory.py --lengths 256
    python benchmarks/memory.py --hidden 576 --vocabulary 49152 --lengths 256 --budget 0.25
    python benchmarks/memory.py --lengths lognormal:180:0.6:1024 --algorithm proma proma_intra

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
    DPPO,
    REFERENCE,
    REINFORCE,
    make_algorithm_trainer,
    make_microbatches,
    peak_resident_bytes,
    step,
    write,
)
from lengths import Lengths
from rollouts import make_rollout_parser, make_rollout_steps, rollout_variants


def measure(arguments: argparse.Namespace, length: int | Lengths) -> int:
    """Peak bytes of two optimizer steps of `arguments.worker`, in this process."""
    if isinstance(length, int):
        trainer = make_algorithm_trainer(arguments, length, arguments.worker)
        microbatches = make_microbatches(arguments, length)

        def peak_of_step() -> int:
            return step(trainer, microbatches, arguments.device)[1]
    else:
        variants = rollout_variants(arguments)
        *key, settings = next(variant for variant in variants if variant[0] == arguments.worker)
        steps = make_rollout_steps(arguments, length, *key, **settings)

        def peak_of_step() -> int:
            return steps().peak

    before = peak_resident_bytes()
    peak = max(peak_of_step() for _ in range(2))
    return peak if arguments.device == "cuda" else peak_resident_bytes() - before


def variants(arguments: argparse.Namespace, length: int | Lengths) -> list[dict]:
    """What has a process: algorithms, and on rollouts their layouts and parts of zero advantages."""
    if isinstance(length, int):
        return [{"algorithm": name} for name in (REFERENCE, *arguments.algorithm)]
    names = ("algorithm", "layout", "zero_advantages")
    return [dict(zip(names, variant, strict=False)) for variant in rollout_variants(arguments)]


def main() -> None:
    parser = make_rollout_parser(__doc__)
    parser.add_argument("--worker", choices=[REFERENCE, *ALGORITHMS, REINFORCE, DPPO], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        (length,) = arguments.lengths
        print(json.dumps(measure(arguments, length)))
        return

    results = []
    print(f"{'T':>24} {'algorithm':>12} {'layout':>9} {'GiB':>9} {'ratio':>7}")
    for length in arguments.lengths:
        reference = None
        for variant in variants(arguments, length):
            algorithm, layout = variant["algorithm"], variant.get("layout", "")
            command = [sys.executable, *sys.argv, "--lengths", str(length), "--worker", algorithm]
            if layout:
                command += ["--layout", layout, "--zero-advantages", str(variant["zero_advantages"])]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            peak = json.loads(run.stdout.splitlines()[-1])
            reference = reference or peak
            written = length if isinstance(length, int) else str(length)
            results.append({"length": written, **variant, "peak_bytes": peak, "ratio": peak / reference})
            print(
                f"{length!s:>24} {algorithm:>12} {layout:>9} {peak / 2**30:>9.3f} {peak / reference:>7.3f}", flush=True
            )
    write(arguments, results)


if __name__ == "__main__":
    main()
