"""DeepSpeed ZeRO."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .single import Backend


class ZeroOneBackend(Backend):
    """ZeRO-1, which shards optimizer states, and averages gradients at the end of an accumulation only."""

    reduces_in_backward = True

    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        return param.grad if param.grad is not None else param.grad_accum


class ZeroTwoThreeBackend(Backend):
    """ZeRO-2 and ZeRO-3, which average and shard each microbatch's gradients: a rank's own can't be read."""

    keeps_accumulated = False
    reduces_in_backward = True

    def accumulated(self, param: nn.Parameter) -> None:
        return None


def is_deepspeed(accelerator: Accelerator | None) -> bool:
    """Whether DeepSpeed has the model."""
    return accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED


def deepspeed_backend(model: nn.Module, accelerator: Accelerator) -> Backend:
    """The backend for a model that DeepSpeed has."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    is_one = isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.partition_gradients
    return ZeroOneBackend(model) if is_one else ZeroTwoThreeBackend(model)


def has_deepspeed_parameters(model: nn.Module) -> bool:
    """Whether DeepSpeed has the model, judged by what ZeRO-3, and ZeRO-1 and 2, leave on a parameter."""
    return any(hasattr(param, mark) for param in model.parameters() for mark in ("ds_id", "param_idx_in_group"))


def whole_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also while ZeRO-3 holds only a shard of it."""
    return getattr(param, "ds_shape", param.shape)
