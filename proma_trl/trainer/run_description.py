"""The line at the beginning of a training that says what it does."""

from __future__ import annotations

import logging
import weakref

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ..backends import whole_shape
from .config import PROMAConfig, counted
from .precision import precision_reason

logger = logging.getLogger(__name__)

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def describe_run(trainer: GRPOTrainer) -> str:
    """
    Returns one line on a training: its method with the settings, the batch, the parameters, and where it runs. For
    example "PROMA (iterative, 2 sweeps, bound 0.5): 128 sequences a step = 16 microbatches x 8 = 16 prompts x
    8 completions; 452,288 trainable parameters; cpu, float32."

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer, [`PROMATrainer`] or TRL's own.
    """
    trained = [param for param in trainer.model.parameters() if param.requires_grad]
    count = sum(whole_shape(param).numel() for param in trained)
    return (
        f"{_method(trainer)}: {_batch(trainer.args, trainer.accelerator.num_processes)}; "
        f"{count:,} trainable parameters; {_device(trainer, trained)}."
    )


class SayWhatRuns(TrainerCallback):
    """
    Says what a training does when it begins, on the main process.

    The line goes to the log where that shows lines of level INFO. By default it does not, and the line is printed
    as the trainer prints its metrics. `logging.getLogger("proma_trl").setLevel(logging.ERROR)` silences it.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer that it is added to.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = weakref.ref(trainer)  # the trainer holds its callbacks

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            say(describe_run(self._trainer()))


def say(message: str) -> None:
    """Log a message that users should see: where INFO is not shown, print it as the trainer prints its metrics."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    elif logger.isEnabledFor(logging.WARNING):
        tqdm.write(message)


def _method(trainer: GRPOTrainer) -> str:
    args, name = trainer.args, trainer._name
    if isinstance(args, PROMAConfig):
        # Controls have longer names, with the method's in them
        return name.replace(args.method_name(), args.method_summary(), 1)
    low, high = trainer.epsilon_low, trainer.epsilon_high
    clipping = f"clipping {low:g}" if low == high else f"clipping {low:g} to {high:g}"
    return f"{name} ({clipping}{f', beta {args.beta:g}' if args.beta else ''})"


def _batch(args: GRPOConfig, ranks: int) -> str:
    microbatches, k = args.gradient_accumulation_steps, args.per_device_train_batch_size
    sequences, generated = microbatches * k * ranks, args.generation_batch_size
    step = f"{counted(sequences, 'sequence')} a step = {_microbatches(microbatches)} x {k}"
    step += f" x {ranks} ranks" if ranks > 1 else ""
    groups = f"{counted(generated // args.num_generations, 'prompt')} x {args.num_generations} completions"
    if generated == sequences and args.num_iterations == 1:
        return f"{step} = {groups}"
    times = f", each used {args.num_iterations} times" if args.num_iterations > 1 else ""
    return f"{step}; {counted(generated, 'sequence')} a generation = {groups}{times}"


def _microbatches(number: int) -> str:
    return "1 microbatch" if number == 1 else f"{number} microbatches"


def _device(trainer: GRPOTrainer, trained: list[torch.nn.Parameter]) -> str:
    dtypes = dict.fromkeys(str(param.dtype).removeprefix("torch.") for param in trained)
    precision = trainer.accelerator.mixed_precision
    how = "" if precision == "no" else f", {_AUTOCAST.get(precision, precision)} autocast"
    reason = precision_reason(trainer.args)
    if reason is not None:
        how = f" ({reason}; `bf16=True` is for bfloat16)"
    return f"{trainer.accelerator.device.type}, {' and '.join(dtypes)}{how}"
