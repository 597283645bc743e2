"""Everything that the package uses of PyTorch beyond its public interface."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState


def backward_id() -> int:
    """A number for the backward pass that runs in this thread, -1 outside of one."""
    return torch._C._current_graph_task_id()


def backward_runs() -> bool:
    """Whether a backward pass runs in this thread, as it does where checkpointed layers are run again."""
    return backward_id() != -1


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the running backward pass has computed all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def function_of(node: Any) -> type[torch.autograd.Function] | None:
    """The `torch.autograd.Function` that a node of a graph belongs to, if it was written in Python."""
    return getattr(type(node), "_forward_cls", None)


def without_torch_function() -> AbstractContextManager:
    """Within the context, subclasses of tensors are treated as tensors."""
    return torch._C.DisableTorchFunctionSubclass()


def run_first(tensor: torch.Tensor, handle: RemovableHandle) -> None:
    """Let the hook of `handle` be the first of those on a tensor's gradient."""
    hooks = tensor._backward_hooks
    # Torch goes by the order of insertion, which `move_to_end` leaves as it is
    others = {key: hooks.pop(key) for key in [*hooks] if key != handle.id}
    hooks.update(others)


def contents(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """Something that changes where a tensor is replaced or written to."""
    return None if tensor is None else (id(tensor), tensor._version)


T = TypeVar("T")


class StorageCache(Generic[T]):
    """Values by tensor, each for as long as the tensor's memory lives and is not written to."""

    def __init__(self):
        self._entries: dict[tuple, tuple[StorageWeakRef, T]] = {}

    def get(self, tensor: torch.Tensor) -> T | None:
        """The value of a tensor that shares its memory, shape and version with `tensor`, or `None`."""
        reference, value = self._entries.get(self._key(tensor), (None, None))
        return None if reference is None or reference.expired() else value

    def put(self, tensor: torch.Tensor, value: T) -> None:
        """Keep a value for `tensor`; forget those of tensors that are gone."""
        self._entries = {key: entry for key, entry in self._entries.items() if not entry[0].expired()}
        self._entries[self._key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), value)

    @staticmethod
    def _key(tensor: torch.Tensor) -> tuple:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The parameters that a module itself holds, also while an attribute of the same name hides one."""
    return module._parameters


def are_innermost(module: nn.Module, before: RemovableHandle, after: RemovableHandle) -> bool:
    """Whether these two hooks run closest to a module's forward: the last before it and the first after it."""
    return (
        next(reversed(module._forward_pre_hooks), None) == before.id
        and next(iter(module._forward_hooks), None) == after.id
    )


def without_hooks(module: nn.Module, params: dict[str, nn.Parameter | None]) -> nn.Module:
    """A shallow copy of a module with other parameters and without forward hooks."""
    # `fully_shard` puts a class of its own before a module's, which makes no copies
    kind = type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)
    copy = kind.__new__(kind)
    copy.__dict__ = {
        **module.__dict__,
        "_parameters": params,
        "_forward_pre_hooks": OrderedDict(),
        "_forward_hooks": OrderedDict(),
    }
    return copy


def fsdp_params(model: nn.Module) -> list[FSDPParam]:
    """FSDP2's records of the parameters that it shards, one for each module group that uses one."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [param for state in states for group in _fsdp_groups(state) for param in group.fsdp_params]


def _fsdp_groups(state: FSDPState) -> list[FSDPParamGroup]:
    """The groups of one module's parameters that are gathered together."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    # Older versions of torch have one at most
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def fsdp_whole_copies(params: Iterable[FSDPParam]) -> dict[nn.Parameter, FSDPParam]:
    """The whole parameters that FSDP2 computes with. They exist once their module has run."""
    return {p._unsharded_param: p for p in params if hasattr(p, "_unsharded_param")}


def fsdp_name(param: FSDPParam) -> str:
    """The name of a sharded parameter in its model."""
    return param._param_fqn
