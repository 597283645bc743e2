"""FSDP2."""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..torch_internals import fsdp_name, fsdp_params, fsdp_whole_copies
from .single import Backend

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam


class FSDPBackend(Backend):
    """FSDP2: computes with whole copies of its sharded parameters, and averages gradients when it is told to."""

    reduces_in_backward = True

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._params = fsdp_params(model)
        self._of_copy: dict[nn.Parameter, FSDPParam] = {}
        # A tied parameter can have a copy in each of two modules
        self._of_shard: dict[nn.Parameter, list[FSDPParam]] = {}

    def leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        self._find_copies()
        yield from super().leaves()
        yield from ((fsdp_name(p), copy) for copy, p in self._of_copy.items() if copy.requires_grad)

    def owner(self, leaf: nn.Parameter) -> nn.Parameter:
        if leaf in self._of_shard:
            return leaf
        if leaf not in self._of_copy:
            self._find_copies()
        return self._of_copy[leaf].sharded_param if leaf in self._of_copy else leaf

    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        for p in self._of_shard.get(param, ()):
            acc = p.unsharded_param.grad if p.unsharded_accumulated_grad is None else p.unsharded_accumulated_grad
            if acc is not None:
                return acc
        if param not in self._of_shard:
            return param.grad  # not FSDP's: an adapter that was added later
        if param.grad is not None:
            raise RuntimeError(
                "FSDP has reduced a microbatch's gradients before the accumulation ended, so that they can't be "
                "projected any more. Let it reduce at the end (`model.set_requires_gradient_sync(False)` until the "
                "last microbatch, as Accelerate does unless `sync_each_batch=True`), and clear gradients after each "
                "optimizer step."
            )
        return None

    def check_leaf_gradient(self, name: str, grad: torch.Tensor) -> None:
        if isinstance(grad, DTensor):
            raise RuntimeError(
                f"`{name}` is used while FSDP holds it in shards, where its sequences' gradients can't be seen. Shard "
                "it together with the modules that run it (`fully_shard` on the whole model), or freeze it."
            )

    def _find_copies(self) -> None:
        self._of_copy = fsdp_whole_copies(self._params)
        self._of_shard = defaultdict(list)
        for p in self._of_copy.values():
            self._of_shard[p.sharded_param].append(p)


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
