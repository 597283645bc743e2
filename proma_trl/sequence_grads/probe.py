"""Copies of modules, to try out how they use their parameters even where these are sharded or not loaded yet."""

import torch
from torch import nn

from ..backends import whole_shape
from ..torch_internals import own_parameters, without_hooks


def runs_as(module: nn.Module) -> object:
    """The function that runs as a module's `forward`: its class's, or one that was set on the module itself."""
    forward = module.__dict__.get("forward", type(module).forward)
    return getattr(forward, "__func__", forward)


def probe(module: nn.Module) -> nn.Module:
    """
    A shallow copy of a module in evaluation mode, without hooks and with noise for its own parameters: those may be
    sharded (ZeRO-3, FSDP2) or yet to be loaded (on the meta device).
    """
    params = {
        name: None if param is None else nn.Parameter(noise(*whole_shape(param), like=param), param.requires_grad)
        for name, param in own_parameters(module).items()
    }
    copy = without_hooks(module, params)
    if "forward" in copy.__dict__:
        copy.forward = runs_as(module).__get__(copy)
    copy.training = False
    return copy


def noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Normal noise that leaves the random state of training alone, on the CPU where `like` has no memory."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu") if like.is_meta else like.device
    return torch.randn(shape, generator=generator).to(device=device, dtype=like.dtype)


def agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same up to the rounding of the coarser dtype."""
    eps = max(torch.finfo(left.dtype).eps, torch.finfo(right.dtype).eps)
    left, right = left.double(), right.double()
    return bool((left - right).norm() <= 64 * eps * right.norm())
