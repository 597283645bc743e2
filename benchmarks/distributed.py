"""
What PROMA costs on many ranks: step time, memory and communication beside REINFORCE's on the same backend.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --backends zero2 zero3 fsdp2 --processes 8 --bf16

For each backend, one launch takes REINFORCE's, the local and the global scope's, and Intra-PROMA's optimizer steps in
turns: medians, and median ratios of the turns. Then each has launches of its own for peak memory (resident memory on a
CPU, the allocator's peak on CUDA). Nothing is sampled: completions are random tokens. Ranks are launched with the
files in `recipes/accelerate`; without a GPU they run on the CPU, where there is no FSDP2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate.utils import gather_object
from common import QUIET, Stopwatch, make_inputs, make_parser, make_trainer, median_ratio, peak_resident_bytes, write

from proma_trl import REINFORCE, IntraPROMA, PROMAConfig, PROMATrainer

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
BACKENDS = {"ddp": "multi_gpu", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
MODES = ("none", "local", "global", "intra")


class RandomCompletions(PROMATrainer):
    """Trains on random tokens in place of completions."""

    def _prepare_inputs(self, batch):
        return self.microbatches[self.state.global_step % len(self.microbatches)]


class Turns(Stopwatch):
    """
    Lets modes take turns, a step each.

    Args:
        trainer (`PROMATrainer`): The trainer.
        modes (`Sequence[str]`): `"none"` (REINFORCE), a scope, or `"intra"`.
        device (`str`): Where the model is.

    Attributes:
        bytes (`dict[str, float]`): What this rank sends, all-to-all, in a microbatch of each mode.
    """

    def __init__(self, trainer: PROMATrainer, modes: Sequence[str], device: str):
        super().__init__(device)
        self.trainer, self.modes = trainer, modes
        self.accumulation = trainer.accumulation
        self.rule = trainer.accumulation.rule if trainer.accumulation is not None else None
        self.mode = self.set_up = modes[0]
        self.sent = 0.0
        self.bytes: dict[str, float] = {}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.mode = self.modes[state.global_step % len(self.modes)]
        self.trainer.accumulation = None if self.mode == "none" else self.accumulation
        if self.mode not in ("none", self.set_up):
            self.set_up = self.mode
            self.accumulation.detach()
            self.accumulation.scope = "global" if self.mode == "global" else "local"
            self.accumulation.rule = REINFORCE() if self.mode == "intra" else self.rule
            self.accumulation.intra = IntraPROMA() if self.mode == "intra" else None
            with self.accumulation.capture():  # starts anew now, outside of the time that is taken
                pass
        self.sent = 0.0
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self.bytes[self.mode] = self.sent / args.gradient_accumulation_steps

    def count(self, all_to_all: Callable[..., Any]) -> Callable[..., Any]:
        """The same collective, counting the bytes that a rank sends."""

        def counted(received, sent):
            world = dist.get_world_size()
            self.sent += sent.numel() * sent.element_size() * (world - 1) / world
            return all_to_all(received, sent)

        return counted

    def seconds_by_mode(self) -> dict[str, list[float]]:
        """Seconds of each mode's steps, without those of the first turn, which warms up."""
        count = len(self.modes)
        return {mode: self.seconds[count + i :: count] for i, mode in enumerate(self.modes)}


def work(arguments: argparse.Namespace) -> None:
    """What each rank runs."""
    modes = MODES if arguments.mode is None else (arguments.mode,)
    (length,) = arguments.lengths
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            RandomCompletions,
            PROMAConfig,
            arguments,
            length,
            folder,
            projection="none" if arguments.mode in ("none", "intra") else arguments.projection,
            intra_dim=arguments.intra_dim if arguments.mode == "intra" else 0,
            projection_scope="global" if arguments.mode == "global" else "local",
            projection_accumulator_dtype=arguments.accumulator_dtype,
            projection_memory_budget=arguments.budget,
            max_steps=len(modes) * (arguments.repeats + 1),
            optim="sgd",
            **QUIET,
        )
        rank = trainer.accelerator.process_index
        trainer.microbatches = [make_inputs(arguments, length, 100 * rank + i) for i in range(4)]
        turns = Turns(trainer, modes, arguments.device)
        if arguments.mode is None:
            dist.all_to_all_single = turns.count(dist.all_to_all_single)
            trainer.add_callback(turns)
        before = peak_resident_bytes()
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else peak_resident_bytes() - before
    peaks = gather_object([peak])
    if rank == 0:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
        result = {"peak_bytes": max(peaks), "bytes_a_microbatch": turns.bytes, "parameters": parameters}
        if arguments.mode is None:
            seconds = turns.seconds_by_mode()
            result["seconds"] = {mode: statistics.median(taken) for mode, taken in seconds.items()}
            result["ratio"] = {mode: median_ratio(taken, seconds["none"]) for mode, taken in seconds.items()}
        print(json.dumps(result), flush=True)
    trainer.accelerator.end_training()


def launch(arguments: argparse.Namespace, backend: str, *extra: str) -> dict[str, Any]:
    """Starts the ranks, and returns what rank 0 reports."""
    config = yaml.safe_load((CONFIGS / f"{BACKENDS[backend]}.yaml").read_text())
    config |= {"num_processes": arguments.processes, "main_process_port": 0}
    if arguments.device == "cpu":
        config |= {"use_cpu": True, "mixed_precision": "no"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file.name]
        command = [*launcher, *sys.argv, "--worker", *extra]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{backend}: the launch failed")
    return json.loads(next(line for line in reversed(run.stdout.splitlines()) if line.startswith("{")))


def main() -> None:
    parser = make_parser(__doc__, lengths=[128], sequences=4, repeats=3)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--accumulator-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--processes", type=int, default=2, help="ranks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.projection == "none":
        parser.error("REINFORCE, which `--projection none` is, is always measured")
    if arguments.worker:
        work(arguments)
        return
    results = []
    print(f"{'backend':>8} {'scope':>8} {'s':>8} {'ratio':>7} {'peak GiB':>9} {'MB sent a microbatch':>21}")
    for backend in arguments.backends:
        timed = launch(arguments, backend)
        for mode in MODES:
            peak = launch(arguments, backend, "--mode", mode)["peak_bytes"]
            results.append(
                {
                    "backend": backend,
                    "scope": mode,
                    "seconds": timed["seconds"][mode],
                    "ratio": timed["ratio"][mode],
                    "peak_bytes": peak,
                    "bytes_sent_a_microbatch": timed["bytes_a_microbatch"][mode],
                    "parameters": timed["parameters"],
                }
            )
            print(
                f"{backend:>8} {mode:>8} {timed['seconds'][mode]:>8.3f} {timed['ratio'][mode]:>7.3f} "
                f"{peak / 2**30:>9.3f} {timed['bytes_a_microbatch'][mode] / 1e6:>21.1f}",
                flush=True,
            )
    write(arguments, results)


if __name__ == "__main__":
    main()
