"""Backends: where gradients are kept, what a whole parameter is, and what is sharded. One file for each."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from .deepspeed import deepspeed_backend, has_deepspeed_parameters, is_deepspeed, whole_shape
from .fsdp import FSDPBackend, is_fsdp
from .single import Backend

__all__ = [
    "Backend",
    "all_zero",
    "backend_for",
    "is_deepspeed",
    "is_distributed",
    "weights_are_sharded",
    "whole_shape",
]


def backend_for(model: nn.Module, accelerator: Accelerator | None) -> Backend:
    """
    The backend of a model, after `accelerator.prepare`.

    Raises:
        RuntimeError: If DeepSpeed trains the model and there is no accelerator to say where an accumulation ends.
    """
    if is_fsdp(model):
        return FSDPBackend(model)
    if is_deepspeed(accelerator):
        return deepspeed_backend(model, accelerator)
    if accelerator is None and has_deepspeed_parameters(model):
        raise RuntimeError("With DeepSpeed, `ProjectedAccumulation` needs the `accelerator` that prepared the model.")
    return Backend(model)


def all_zero(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether this rank's parts of some gradients, at least one, are zero. It waits for the device."""
    own = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
    return bool(own) and not torch.stack([x.any().to(own[0].device) for x in own]).any().item()


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def weights_are_sharded(accelerator: Accelerator) -> bool:
    """Whether an accelerator shards weights over ranks: ZeRO-3 and FSDP."""
    if is_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return getattr(accelerator.state, "fsdp_plugin", None) is not None
