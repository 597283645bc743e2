"""Copies of modules, to try out how they use their parameters even where these are sharded or not loaded yet."""

import dis
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from ..backends import whole_shape
from ..devices import fork_random_numbers
from ..torch_internals import own_parameters, without_hooks


def runs_as(module: nn.Module) -> object:
    """The function that runs as a module's `forward`: its class's, or one that was set on the module itself."""
    forward = module.__dict__.get("forward", type(module).forward)
    return getattr(forward, "__func__", forward)


def children_used_directly(module: nn.Module) -> list[str]:
    """
    Names of the children whose parameters a module uses itself, without running them: its methods say
    `self.conv.weight`, as mixers' do that hand a convolution's parameters to a kernel, or `self.experts.map(...)`,
    with a method of the child's. A list of parameters is used by its parent.
    """
    used = [name for name, child in module.named_children() if isinstance(child, (nn.ParameterList, nn.ParameterDict))]
    for name, attribute in _attributes_of_attributes(type(module)):
        child = module._modules.get(name)
        if child is not None and (attribute in own_parameters(child) or _is_own_method(child, attribute)):
            used.append(name)
    return list(dict.fromkeys(used))


def _is_own_method(module: nn.Module, name: str) -> bool:
    """Whether a module that holds parameters has a method of this name, beside `forward` and what all modules have."""
    return (
        name != "forward"
        and not hasattr(nn.Module, name)
        and bool(own_parameters(module))
        and inspect.isfunction(getattr(type(module), name, None))
    )


@cache
def _attributes_of_attributes(kind: type[nn.Module]) -> list[tuple[str, str]]:
    """Every `self.first.second` in the methods of a class, but for those of which only the dtype or shape is asked."""
    functions = (
        value
        for base in kind.__mro__
        if issubclass(base, nn.Module) and base is not nn.Module
        for value in vars(base).values()
    )
    codes = (function.__code__ for function in map(_undecorated, functions) if hasattr(function, "__code__"))
    return [pair for code in codes for pair in _pairs(list(dis.get_instructions(code)))]


def _undecorated(value: object) -> object:
    return inspect.unwrap(value) if callable(value) else value


def _pairs(instructions: list[dis.Instruction]) -> Iterator[tuple[str, str]]:
    loads = [i.argval if i.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for i in instructions]
    for first, second, third in zip(loads, loads[1:], [*loads[2:], None], strict=False):
        if first is not None and second is not None and third not in ("dtype", "device", "shape", "size", "is_meta"):
            yield first, second


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
    # Buffers that hold no numbers yet, as a model on the meta device has them
    copy._buffers = {
        name: torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer is not None and buffer.is_meta else buffer
        for name, buffer in module._buffers.items()
    }
    return copy


def noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Normal noise that leaves the random state of training alone, on the CPU where `like` has no memory."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu") if like.is_meta else like.device
    return torch.randn(shape, generator=generator).to(device=device, dtype=like.dtype)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """What comes after the context draws the random numbers that it would have drawn without it."""
    with fork_random_numbers(device):
        yield


def agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same up to the rounding of the coarser dtype."""
    eps = max(torch.finfo(left.dtype).eps, torch.finfo(right.dtype).eps)
    left, right = left.double(), right.double()
    return bool((left - right).norm() <= 64 * eps * right.norm())
