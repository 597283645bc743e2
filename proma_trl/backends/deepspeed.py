"""DeepSpeed ZeRO."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .single import Backend


class ZeroOneBackend(Backend):
    """ZeRO-1: shards optimizer states, and averages gradients only at the end of an accumulation."""

    reduces_in_backward = True

    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        return param.grad if param.grad is not None else param.grad_accum


class ZeroTwoThreeBackend(Backend):
    """ZeRO-2 and ZeRO-3: average and shard the gradients of each microbatch, so that a rank's own can't be read."""

    keeps_accumulated = False
    reduces_in_backward = True

    def accumulated(self, param: nn.Parameter) -> None:
        return None


def is_deepspeed(accelerator: Accelerator | None) -> bool:
    """Whether DeepSpeed trains the model."""
    return accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED


def deepspeed_backend(model: nn.Module, accelerator: Accelerator) -> Backend:
    """The backend of a model that DeepSpeed trains."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    is_one = isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.partition_gradients
    return ZeroOneBackend(model) if is_one else ZeroTwoThreeBackend(model)


def has_deepspeed_parameters(model: nn.Module) -> bool:
    """Whether DeepSpeed trains the model, judged by the attributes that its ZeRO stages set on parameters."""
    return any(hasattr(param, mark) for param in model.parameters() for mark in ("ds_id", "param_idx_in_group"))


def whole_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also while ZeRO-3 holds only a shard of it."""
    return getattr(param, "ds_shape", param.shape)
