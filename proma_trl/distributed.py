"""Where accumulated gradients lie, and what crosses ranks: one device, DDP, DeepSpeed ZeRO and FSDP2.

What the projection emits is added up and averaged over ranks by the backend, like any gradient. All that differs from
one backend to another is how `acc`, what a rank has accumulated since the last optimizer step, can be read; and, where
the projection's scope is global, against which sequences and which `acc` it is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .sequence_grads.factored import sum_dtype

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

SCOPES = ("local", "global")


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Gradients:
    """
    The tensors for which autograd makes gradients, and what has been accumulated in them on this rank: on one device,
    and under DDP, which averages at the end of an accumulation only.

    Args:
        model (`nn.Module`): Model whose parameters are trained.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, as they are after a forward pass, with their names."""
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def owner(self, leaf: nn.Parameter) -> nn.Parameter:
        """The parameter that a leaf, or several ones, stand for."""
        return leaf

    def read(self, param: nn.Parameter) -> torch.Tensor | None:
        """What has been accumulated for a parameter, `(rows, *rest)`, or `None`."""
        return param.grad


class ZeroOneGradients(Gradients):
    """ZeRO-1, which averages at the end of an accumulation only."""

    def read(self, param: nn.Parameter) -> torch.Tensor | None:
        return param.grad if param.grad is not None else param.grad_accum


class FSDPGradients(Gradients):
    """FSDP2, which computes with whole copies of its sharded parameters and averages when it is told to."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
        self._params = [param for state in states for group in state._fsdp_param_groups for param in group.fsdp_params]
        self._of_copy: dict[nn.Parameter, FSDPParam] = {}
        self._of_shard: dict[nn.Parameter, list[FSDPParam]] = {}

    def _find_copies(self) -> None:
        # They come to be when their module first runs. A tied parameter can have one in each of two modules.
        found = [p for p in self._params if hasattr(p, "_unsharded_param")]
        self._of_copy = {p._unsharded_param: p for p in found}
        self._of_shard = {p.sharded_param: [] for p in found}
        for p in found:
            self._of_shard[p.sharded_param].append(p)

    def leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        self._find_copies()
        yield from super().leaves()
        yield from ((p._param_fqn, copy) for copy, p in self._of_copy.items() if copy.requires_grad)

    def owner(self, leaf: nn.Parameter) -> nn.Parameter:
        if leaf not in self._of_copy:
            self._find_copies()
        return self._of_copy[leaf].sharded_param if leaf in self._of_copy else leaf

    def read(self, param: nn.Parameter) -> torch.Tensor | None:
        for p in self._of_shard.get(param, ()):
            acc = p._unsharded_param.grad if p.unsharded_accumulated_grad is None else p.unsharded_accumulated_grad
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


class Scope(Protocol):
    """
    Against what a microbatch is projected.

    Attributes:
        advantages (`(n,)`): `a_i` of all n sequences that take part in the running backward pass.
    """

    advantages: torch.Tensor

    def begin(self, advantages: torch.Tensor) -> None:
        """A backward pass begins on this rank, with `advantages` of shape `(k,)`."""

    def holds(self, param: nn.Parameter) -> bool:
        """Whether anything has been accumulated for `param`."""

    def norm_sq(self, param: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        """This rank's addend of `|acc|^2`."""

    def local(self, param: nn.Parameter) -> torch.Tensor | None:
        """`acc`, where this rank alone accumulates it."""

    def meet(
        self, param: nn.Parameter, acc: torch.Tensor | None, grads: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Bring sequences and `acc` together.

        Args:
            param (`nn.Parameter`): The tensor.
            acc (`(rows, *rest)` or `None`): What `local` returned, or the part of it at which `grads` are not zero.
            grads (`(k, m)`): This rank's sequence gradients at rows `start:stop`, flat.

        Returns:
            `(n, m')` and `(m',)`: all sequences, and `acc`, at those of the m entries that are this rank's to sum.
        """

    def total(self, *sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What all ranks' addends amount to."""

    def own(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Of the n coefficients, those of this rank's sequences, `(k,)`."""

    def add(self, param: nn.Parameter, emission: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
        """This rank emits `emission`, `(rows, *rest)`, as the gradient of `param`; `ranges` are those of `meet`."""

    def end(self) -> None:
        """The accumulation ends with an optimizer step."""


class LocalScope:
    """
    Each rank projects its own accumulation off its own sequences.

    Args:
        read (`Callable`): Returns what the backend has accumulated for a parameter on this rank.
    """

    def __init__(self, read: Callable[[nn.Parameter], torch.Tensor | None]):
        self.local = read

    def begin(self, advantages: torch.Tensor) -> None:
        self.advantages = advantages

    def holds(self, param: nn.Parameter) -> bool:
        return self.local(param) is not None

    def norm_sq(self, param: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        return torch.linalg.vector_norm(self.local(param), dtype=dtype).square()

    def meet(self, param, acc, grads, start, stop):
        return grads, acc[start:stop].flatten()

    def total(self, *sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sums

    def own(self, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients

    def add(self, param, emission, ranges) -> None:
        pass

    def end(self) -> None:
        pass


class RankLocalScope(LocalScope):
    """
    Keeps what this rank has emitted, for backends that average and shard it right away: ZeRO-2 and ZeRO-3.

    Args:
        dtype (`torch.dtype`): What it is kept in. It takes as many elements as all trainable parameters.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        super().__init__(self._sums.get)

    def add(self, param, emission, ranges) -> None:
        if param in self._sums:
            self._sums[param] += emission
        else:
            # A copy: the backend goes on to reduce the emission in place
            self._sums[param] = emission.to(self._dtype, copy=True)

    def end(self) -> None:
        self._sums.clear()


class GlobalScope:
    """
    W ranks project as one rank with all their sequences would.

    Each rank keeps a shard of the sum of all accumulations. An all-to-all gives it the same shard of all W k sequence
    gradients; Gram matrix, overlaps and norm of the shards are summed over ranks, and every rank solves for all
    coefficients, to use those of its own sequences. A backend's average over ranks of what they emit is then what the
    one rank would have accumulated.

    It sends `4 (W-1)/W (k+1)` bytes a trainable element and microbatch from each rank, all-to-all.

    Args:
        size (`int`): Largest number of sequences in a rank's microbatch; smaller ones count as if filled up with
            sequences without gradients.
    """

    def __init__(self, size: int):
        self._size = size
        self._rank = dist.get_rank()
        self._world = dist.get_world_size()
        self._sums: dict[nn.Parameter, dict[int, torch.Tensor]] = {}
        self._k = 0

    def begin(self, advantages: torch.Tensor) -> None:
        self._k = len(advantages)
        padded = nn.functional.pad(advantages, (0, self._size - self._k)).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(self._world)]
        dist.all_gather(gathered, padded)
        self.advantages = torch.cat(gathered)

    def holds(self, param: nn.Parameter) -> bool:
        return param in self._sums

    def local(self, param: nn.Parameter) -> None:
        return None

    def norm_sq(self, param: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        shards = self._sums[param].values()
        return torch.stack([torch.linalg.vector_norm(shard, dtype=dtype).square() for shard in shards]).sum()

    def meet(self, param, acc, grads, start, stop):
        grads = nn.functional.pad(grads, (0, 0, 0, self._size - len(grads)))
        return self._exchange(grads), self._sums[param][start]

    def total(self, *sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = torch.cat([x.flatten().double() for x in sums])
        dist.all_reduce(flat)
        parts = flat.split([x.numel() for x in sums])
        return tuple(part.view_as(x).to(x.dtype) for part, x in zip(parts, sums, strict=True))

    def own(self, coefficients: torch.Tensor) -> torch.Tensor:
        first = self._rank * self._size
        return coefficients[first : first + self._k]

    def add(self, param, emission, ranges) -> None:
        shards = self._sums.setdefault(param, {})
        for start, stop in ranges:
            addend = self._exchange(emission[start:stop].reshape(1, -1)).sum(0, dtype=sum_dtype(emission))
            shards[start] = shards[start].add_(addend) if start in shards else addend

    def end(self) -> None:
        self._sums.clear()

    def _exchange(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(k, m)` on every rank to its shard of all ranks' vectors, `(W k, m / W)`, those of rank 0 first."""
        k, length = vectors.shape
        vectors = nn.functional.pad(vectors, (0, -length % self._world))
        sent = vectors.view(k, self._world, -1).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received.flatten(0, 1)


def gradients_for(model: nn.Module, accelerator: Accelerator | None) -> Gradients:
    """
    Where the gradients of a model lie as it stands now, after `accelerator.prepare`.

    Raises:
        RuntimeError: If DeepSpeed has the model, and there is no accelerator to ask where an accumulation ends.
    """
    # What ZeRO-3, and what ZeRO-1 and 2 leave on a parameter
    marks = ("ds_id", "param_idx_in_group")
    if accelerator is None and any(hasattr(param, mark) for param in model.parameters() for mark in marks):
        raise RuntimeError("With DeepSpeed, `ProjectedAccumulation` needs the `accelerator` that prepared the model.")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return FSDPGradients(model)
    if _is_zero_one(accelerator):
        return ZeroOneGradients(model)
    return Gradients(model)


def scope_for(
    scope: str, gradients: Gradients, accelerator: Accelerator | None, size: int, dtype: torch.dtype
) -> Scope:
    """
    Args:
        scope (`str`): `"local"` or `"global"`.
        gradients ([`Gradients`]): Where gradients lie.
        accelerator (`Accelerator` or `None`): What prepared the model.
        size (`int`): Largest number of sequences in a rank's microbatch.
        dtype (`torch.dtype`): What [`RankLocalScope`] keeps gradients in.
    """
    if scope == "global" and accelerator is not None and accelerator.num_processes > 1:
        return GlobalScope(size)
    if is_deepspeed(accelerator) and not isinstance(gradients, ZeroOneGradients):
        return RankLocalScope(dtype)
    return LocalScope(gradients.read)


def reduces_in_backward(model: nn.Module, accelerator: Accelerator | None) -> bool:
    """Whether gradients can't be had from a backward pass of its own: DeepSpeed, FSDP."""
    return is_deepspeed(accelerator) or any(isinstance(module, FSDPModule) for module in model.modules())


def is_deepspeed(accelerator: Accelerator | None) -> bool:
    """Whether DeepSpeed has the model."""
    return accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED


def _is_zero_one(accelerator: Accelerator | None) -> bool:
    if not is_deepspeed(accelerator):
        return False
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    return isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.partition_gradients
