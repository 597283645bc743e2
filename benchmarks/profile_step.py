"""
Where the time of PROMATrainer's optimizer step goes beyond an ordinary one.

    python benchmarks/profile_step.py --lengths 256 --prompt 0.02

Times the parts of the projection on a CPU, where they run one after another, and gives them as parts of the step. It
takes the arguments of `step_time.py`.
"""

import functools
import tempfile
import time
from collections import defaultdict

import step_time

import proma_trl.accumulation as accumulation
from proma_trl import PROMAConfig, PROMATrainer
from proma_trl.accumulation import ProjectedAccumulation
from proma_trl.sequence_grads.fused_head import _SequenceLogProbs

PARTS = {
    "sequence gradients": (ProjectedAccumulation, "_dense"),
    "Gram matrices": (accumulation, "_gram"),
    "coefficients": (accumulation, "solve"),
    "first microbatch's gradients": (accumulation, "_combine"),
    "all of the projection": (ProjectedAccumulation, "_emission"),
    "the head's backward pass, with its projection": (_SequenceLogProbs, "backward"),
}


def timed(function, seconds, name):
    """The same function, adding up the time that it takes."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    return wrapper


def main() -> None:
    parser = step_time.make_parser()
    parser.description = __doc__
    arguments = parser.parse_args()
    seconds = defaultdict(float)
    for name, (owner, function) in PARTS.items():
        wrapped = timed(getattr(owner, function), seconds, name)
        setattr(owner, function, staticmethod(wrapped) if owner is _SequenceLogProbs else wrapped)
    for length in arguments.lengths:
        with tempfile.TemporaryDirectory() as folder:
            trainer = step_time.make_trainer(PROMATrainer, PROMAConfig, arguments, length, folder)
        microbatches = [step_time.make_inputs(arguments, length, seed) for seed in range(arguments.microbatches)]
        step_time.step(trainer, microbatches, "cpu")
        seconds.clear()
        total = sum(step_time.step(trainer, microbatches, "cpu")[0] for _ in range(arguments.repeats))
        print(f"T = {length}: {total / arguments.repeats:.3f} s a step")
        for name in PARTS:
            print(f"  {seconds[name] / total:>6.1%}  {name}")


if __name__ == "__main__":
    main()
