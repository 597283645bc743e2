"""Accumulators hold what has been accumulated, `acc`, and compute its inner products with the sequence gradients.

The backend adds up what is emitted and averages it over ranks, as it does with any gradient. An accumulator has to
know `acc` only for the inner products.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ..backends import Backend
from ..devices import widest_dtype
from ..rules.inner_products import InnerProducts, noise_ratio, rank_tolerance
from ..sequence_grads.forms import batched_product, sum_dtype
from ..sequence_grads.tensor import Range, TensorGrads

SCOPES = ("local", "global")

# Elements of k sequence gradients up to which a Gram matrix that will be inverted is summed in float64 (8 MiB)
_SMALL = 2**20


@dataclass(frozen=True)
class Request:
    """
    A request for the inner products of one tensor.

    Attributes:
        name (`str`): The parameter's name.
        param (`nn.Parameter`): The parameter.
        overlaps (`bool`): Whether those with `acc` are, if anything has been accumulated.
        inverts_gram (`bool`): Whether the Gram matrix will be inverted.
        precision (`torch.dtype`): Lowest precision of the products that the sequence gradients come from.
        loss_scale (scalar): What the backward pass multiplies the loss by.
        acc (`(rows, *rest)`, *optional*): What takes the place of `acc`, if it is not what has been accumulated.
    """

    name: str
    param: nn.Parameter
    overlaps: bool
    inverts_gram: bool
    precision: torch.dtype
    loss_scale: torch.Tensor
    acc: torch.Tensor | None = None


class Accumulator(ABC):
    """
    Holds `acc` of all parameters.

    Attributes:
        advantages (`(n,)`): `a_i` of all n sequences that take part in the running backward pass.
        own (`slice`): Which of them are this rank's.
        num_sequences (`int` or scalar): Their number, without those that only fill up a smaller microbatch.
        planned_sequences (`int` or `None`): The number of a rank's sequences for which row ranges are planned, where
            they must not change between microbatches. `None`: the microbatch's own.
    """

    advantages: torch.Tensor
    own: slice = slice(None)
    num_sequences: int | torch.Tensor
    planned_sequences: int | None = None

    def begin(self, advantages: torch.Tensor) -> None:
        """A backward pass begins on this rank, with `advantages` of shape `(k,)`."""
        self.advantages, self.num_sequences = advantages, len(advantages)

    @abstractmethod
    def holds(self, param: nn.Parameter) -> bool:
        """Whether anything has been accumulated for `param`."""

    def inner_products(self, request: Request, grads: TensorGrads) -> InnerProducts:
        """The inner products of all n sequences' gradients, and with `acc`."""
        overlaps = request.overlaps and self.holds(request.param)
        acc = self._read(request, grads) if overlaps else None
        # Inverting a Gram matrix squares the condition of the sequences. Float64 makes up for that where it costs
        # nothing and matters: k gradients of a small tensor can nearly be dependent.
        wide = widest_dtype(grads.device)
        small = request.inverts_gram and grads.num_sequences * grads.size <= _SMALL
        held = grads.held_dtype
        dtype = wide if small and held == grads.dtype else held
        grams = []
        for start, stop in grads.ranges:
            part = self._part(acc, request.param, start, stop) if overlaps else None
            grams.append(_gram(self._vectors(grads, start, stop, part).to(dtype), wide))
        gram = grams[0] if len(grams) == 1 else torch.stack(grams).sum(0)
        if overlaps and grads.is_compact:  # |acc|^2 counts the rows that are left out
            gram[-1, -1] = self._norm_sq(request, grads.dtype)
        gram = self._total(gram)
        n = len(self.advantages)
        return InnerProducts(
            gram[:n, :n],
            *((gram[:n, n], gram[n, n]) if overlaps else ()),
            names=(request.name,),
            num_sequences=self.num_sequences,
            loss_scale=request.loss_scale,
            rank_tolerance=rank_tolerance(n, torch.promote_types(dtype, torch.float32), held),
            noise_ratio=noise_ratio(request.precision),
        )

    def keep(  # noqa: B027 - where the backend keeps it, there is nothing to do
        self, param: nn.Parameter, emission: torch.Tensor, ranges: Sequence[Range]
    ) -> None:
        """This rank emits `emission`, `(rows, *rest)`, as the gradient of `param`; `ranges` are those of its rows."""

    def end(self) -> None:  # noqa: B027 - as above
        """The accumulation ends with an optimizer step."""

    @abstractmethod
    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        """`acc` of a parameter, in its whole shape; `None` where nothing has been accumulated."""

    @abstractmethod
    def _read(self, request: Request, grads: TensorGrads) -> torch.Tensor | None:
        """`acc`, if this rank alone has it, and without the rows that don't matter, which `grads` leaves out, too."""

    def _norm_sq(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        """This rank's addend of `|acc|^2`, where `grads` leaves rows out."""
        raise NotImplementedError

    @abstractmethod
    def _part(self, acc: torch.Tensor | None, param: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        """`acc` at those entries of the rows `start:stop` that this rank sums, flat."""

    def _vectors(self, grads: TensorGrads, start: int, stop: int, acc: torch.Tensor | None) -> torch.Tensor:
        """All sequences at the entries that this rank sums, `(n, m)`; with `acc` as the last of them, `(n + 1, m)`."""
        return grads.rows(start, stop, acc)

    def _total(self, gram: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' inner products."""
        return gram


class LocalAccumulator(Accumulator):
    """
    Each rank's own accumulation, read from the backend, which keeps it.

    Args:
        backend ([`Backend`]): The backend.
    """

    def __init__(self, backend: Backend):
        self._acc = backend.accumulated

    def holds(self, param: nn.Parameter) -> bool:
        return self._acc(param) is not None

    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        return self._acc(param)

    def _read(self, request: Request, grads: TensorGrads) -> torch.Tensor:
        acc = self._acc(request.param) if request.acc is None else request.acc
        return grads.compact(acc.view(grads.shape))

    def _norm_sq(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        acc = self._acc(request.param) if request.acc is None else request.acc
        return torch.linalg.vector_norm(acc, dtype=dtype).square()

    def _part(self, acc: torch.Tensor, param: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        return acc[start:stop].flatten()


class KeptAccumulator(LocalAccumulator):
    """
    Each rank's own accumulation, kept here, as the backend averages and shards gradients right away.

    Args:
        dtype (`torch.dtype`): What it is kept in. It takes as many elements as all trainable parameters.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._acc = self._sums.get

    def keep(self, param: nn.Parameter, emission: torch.Tensor, ranges: Sequence[Range]) -> None:
        if param in self._sums:
            self._sums[param] += emission
        else:
            # A copy: the backend goes on to reduce the emission in place
            self._sums[param] = emission.to(self._dtype, copy=True)

    def end(self) -> None:
        self._sums.clear()


class GlobalAccumulator(Accumulator):
    """
    The accumulation of all ranks together: W ranks do what one rank with all their sequences would do.

    Each rank keeps a shard of the sum of all accumulations. An all-to-all gives it the same shard of all W k sequence
    gradients; Gram matrix, overlaps and norm of the shards are summed over ranks. Every rank then knows all
    coefficients, and uses those of its own sequences. A backend's average over ranks of what they emit is what the one
    rank would have accumulated.

    It sends `4 (W-1)/W (k+1)` bytes a trainable element and microbatch from each rank, all-to-all.

    Args:
        size (`int`): Largest number of sequences in a rank's microbatch; smaller ones are filled up with sequences
            without gradients.
        keeps (`bool`): Whether `acc` is needed at all.
    """

    def __init__(self, size: int, keeps: bool):
        self._size = self.planned_sequences = size
        self._keeps = keeps
        self._rank = dist.get_rank()
        self._world = dist.get_world_size()
        self._sums: dict[nn.Parameter, dict[int, torch.Tensor]] = {}

    def begin(self, advantages: torch.Tensor) -> None:
        k = len(advantages)
        counted = nn.functional.pad(advantages, (0, self._size - k + 1))
        counted[-1] = k
        gathered = [torch.empty_like(counted) for _ in range(self._world)]
        dist.all_gather(gathered, counted)
        self.advantages = torch.cat([x[:-1] for x in gathered])
        self.num_sequences = torch.stack([x[-1] for x in gathered]).sum()
        self.own = slice(self._rank * self._size, self._rank * self._size + k)

    def holds(self, param: nn.Parameter) -> bool:
        return param in self._sums

    def keep(self, param: nn.Parameter, emission: torch.Tensor, ranges: Sequence[Range]) -> None:
        if not self._keeps:
            return
        shards = self._sums.setdefault(param, {})
        for start, stop in ranges:
            addend = self._exchange(emission[start:stop].reshape(1, -1)).sum(0, dtype=sum_dtype(emission))
            shards[start] = shards[start].add_(addend) if start in shards else addend

    def end(self) -> None:
        self._sums.clear()

    def accumulated(self, param: nn.Parameter) -> None:
        return None  # each rank has a shard

    def _read(self, request: Request, grads: TensorGrads) -> None:
        return None

    def _part(self, acc: None, param: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        return self._sums[param][start]

    def _vectors(self, grads: TensorGrads, start: int, stop: int, acc: torch.Tensor | None) -> torch.Tensor:
        own = grads.rows(start, stop)
        shared = self._exchange(nn.functional.pad(own, (0, 0, 0, self._size - len(own))))
        return shared if acc is None else torch.cat([shared, acc.unsqueeze(0).to(shared.dtype)])

    def _total(self, gram: torch.Tensor) -> torch.Tensor:
        wide = gram.double()
        dist.all_reduce(wide)
        return wide.to(gram.dtype)

    def _exchange(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(k, m)` on every rank to its shard of all ranks' vectors, `(W k, m / W)`, those of rank 0 first."""
        k, length = vectors.shape
        vectors = nn.functional.pad(vectors, (0, -length % self._world))
        sent = vectors.view(k, self._world, -1).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received.flatten(0, 1)


def accumulator_for(
    backend: Backend,
    accelerator: Accelerator | None,
    *,
    scope: str,
    size: int,
    keeps: bool,
    dtype: torch.dtype,
) -> Accumulator:
    """
    Args:
        backend ([`Backend`]): Where gradients are kept.
        accelerator (`Accelerator` or `None`): What prepared the model.
        scope (`str`): `"local"` or `"global"`.
        size (`int`): Largest number of sequences in a rank's microbatch.
        keeps (`bool`): Whether the update rule needs `acc`.
        dtype (`torch.dtype`): What [`KeptAccumulator`] keeps gradients in.
    """
    if scope == "global" and accelerator is not None and accelerator.num_processes > 1:
        return GlobalAccumulator(size, keeps)
    if keeps and not backend.keeps_accumulated:
        return KeptAccumulator(dtype)
    return LocalAccumulator(backend)


def _gram(grads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`grads @ grads^T` for `(k, n)`, in pieces that stay in cache: k is far too small for one product to be fast."""
    k, n = grads.shape
    pieces = grads.view(k, math.gcd(n, 64), -1).transpose(0, 1)
    return batched_product(pieces, pieces.mT).sum(0, dtype=dtype)
