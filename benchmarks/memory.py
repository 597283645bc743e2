"""
Peak memory of PROMATrainer beside GRPOTrainer's, for the same optimizer steps as in `step_time.py`.

    python benchmarks/memory.py --lengths 256
    python benchmarks/memory.py --hidden 576 --vocabulary 49152 --lengths 256 --budget 0.25

Each trainer has a process of its own. On a CPU the figure is the process's peak resident memory after the steps, with
that before the first step taken off. Freed tensors go back to the system at once (by glibc's settings below), so that
it is what was alive at one time, and not what the heap has kept. On CUDA it is the allocator's peak during a step. It
takes the arguments of `step_time.py`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile

import step_time
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer


def measure(arguments, algorithm, length):
    """Peak bytes of two optimizer steps, in this process."""
    proma = algorithm == "proma"
    kwargs = {"projection": arguments.projection, "projection_memory_budget": arguments.budget} if proma else {}
    classes = (PROMATrainer, PROMAConfig) if proma else (GRPOTrainer, GRPOConfig)
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_time.make_trainer(*classes, arguments, length, folder, **kwargs)
    microbatches = [step_time.make_inputs(arguments, length, seed) for seed in range(arguments.microbatches)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = max(step_time.step(trainer, microbatches, arguments.device)[1] for _ in range(2))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if arguments.device == "cuda" else (after - before) * 1024  # Linux counts in KiB


def main() -> None:
    parser = step_time.make_parser()
    parser.description = __doc__
    parser.add_argument("--algorithm", choices=["grpo", "proma"], help="measure only this, in this process")
    arguments = parser.parse_args()
    if arguments.algorithm is not None:
        print(json.dumps({str(n): measure(arguments, arguments.algorithm, n) for n in arguments.lengths}))
        return

    results = []
    print(f"{'T':>6} {'GRPO GiB':>9} {'PROMA GiB':>9} {'ratio':>7}")
    for length in arguments.lengths:
        peaks = {}
        for algorithm in ("grpo", "proma"):
            command = [sys.executable, *sys.argv, "--lengths", str(length), "--algorithm", algorithm]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            output = run.stdout
            peaks[algorithm] = json.loads(output.splitlines()[-1])[str(length)]
        grpo, proma = peaks["grpo"], peaks["proma"]
        results.append({"length": length, "grpo_peak_bytes": grpo, "proma_peak_bytes": proma})
        print(f"{length:>6} {grpo / 2**30:>9.3f} {proma / 2**30:>9.3f} {proma / grpo:>7.3f}", flush=True)
    step_time.write(arguments, results)


if __name__ == "__main__":
    main()
