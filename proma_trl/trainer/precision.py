"""What a training computes in where its settings leave that open."""

import os

import torch
from accelerate.utils import is_torch_xla_available, parse_flag_from_env
from trl import GRPOConfig


def choose_precision(args: GRPOConfig) -> None:
    """
    Let a training on a CPU compute in float32, unless its settings or Accelerate's ask for another precision. TRL's
    default is bfloat16, which transformers refuses without a GPU, and which is slow on CPUs. Where there is no
    accelerator, `use_cpu` is set.

    Args:
        args ([`~trl.GRPOConfig`]): The configuration, changed in place, before its own `__post_init__`.
    """
    cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if not cpu and (torch.accelerator.is_available() or is_torch_xla_available()):
        return
    if args.bf16 is not None or args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return
    args.use_cpu, args.bf16 = True, False
    args._precision_reason = "the CPU's default" if cpu else "no GPU or other accelerator was found"


def precision_reason(args: GRPOConfig) -> str | None:
    """Returns why [`choose_precision`] has chosen float32, or `None` where it has not."""
    return getattr(args, "_precision_reason", None)
