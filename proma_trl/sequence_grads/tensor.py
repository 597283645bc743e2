"""The sequence gradients of one parameter tensor, all its uses together, read by ranges of rows."""

import math
from collections.abc import Sequence

import torch

from ..devices import accelerates
from .forms import Dense, Rows, SequenceGrads, add_product, sum_dtype, weighted_sum

Range = tuple[int, int]


class Scratch:
    """Memory for the sequence gradients of one tensor at a time. On a CPU, fresh memory costs as much as products."""

    def __init__(self):
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def take(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory, valid until the next call."""
        if accelerates(device):  # its allocator keeps freed memory at hand
            return torch.empty(shape, device=device, dtype=dtype)
        size = math.prod(shape)
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer) < size:
            self._buffers.pop(dtype, None)
            self._buffers[dtype] = buffer = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


class TensorGrads:
    """
    The k sequence gradients of one parameter tensor of shape `(rows, *rest)`.

    Args:
        parts (`Sequence[SequenceGrads]`): One for each use of the parameter.
        shape (`tuple[int, ...]`): The parameter's whole shape, or `(1,)` for a scalar.
        like (`torch.Tensor`): Has the parameter's dtype and device.
        num_sequences (`int`): k.
        limit (`int`): Number of bytes that may be held at a time for one sequence.
        scratch ([`Scratch`]): Where they are held.

    Attributes:
        dtype (`torch.dtype`): What weighted sums of the gradients are returned in.
        held_dtype (`torch.dtype`): What the gradients are held in; see [`held_dtype`].
        is_compact (`bool`): Whether rows have been left out.
        ranges (`list[tuple[int, int]]`): Ranges of rows that together cover the tensor, each within `limit`.
    """

    def __init__(
        self,
        parts: Sequence[SequenceGrads],
        shape: tuple[int, ...],
        like: torch.Tensor,
        num_sequences: int,
        limit: int,
        scratch: Scratch,
    ):
        self.parts = parts
        self.shape = shape
        self.num_sequences = num_sequences
        self.device, self.dtype = like.device, sum_dtype(like)
        held = {part.dtype for part in parts if part.dtype is not None}
        self.held_dtype = torch.bfloat16 if held == {torch.bfloat16} else self.dtype
        self._limit = limit // self.held_dtype.itemsize
        self.ranges = row_ranges(shape, self._limit)
        self._scratch = scratch
        self._positions: torch.Tensor | None = None
        self._whole_shape = shape
        self._held: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of elements of one sequence's gradient."""
        return math.prod(self.shape)

    def compact(self, acc: torch.Tensor) -> torch.Tensor:
        """
        Leave out rows in which all gradients are zero, if the form tells them: those of tokens that don't occur.

        Args:
            acc (`(rows, *rest)`): What has been accumulated.

        Returns:
            `(rows', *rest)`: The rows of it that are left.
        """
        if not all(isinstance(part, Rows) for part in self.parts):
            return acc
        if self.parts[0].indices.numel() * len(self.parts) >= self.shape[0]:
            return acc
        merged = Rows(
            torch.cat([part.indices for part in self.parts], 1),
            torch.cat([part.values for part in self.parts], 1),
            self.shape[0],
        )
        part, self._positions = merged.compact()
        acc = acc.index_select(0, self._positions)
        self.parts, self.shape = [part], tuple(acc.shape)
        self.ranges = row_ranges(self.shape, self._limit)
        return acc

    @property
    def is_compact(self) -> bool:
        return self._positions is not None

    def rows(self, start: int, stop: int, beside: torch.Tensor | None = None) -> torch.Tensor:
        """
        Rows `start:stop` of all sequence gradients, flat: `(k, n)`, valid until the next call; with `beside`, `(n,)`,
        as one more of them: `(k + 1, n)`.
        """
        first, rest = self.parts[0], self.parts[1:]
        k, count = self.num_sequences, self.num_sequences + (beside is not None)
        if isinstance(first, Dense) and first.grads.dtype == self.held_dtype and (first.owned or not rest):
            out = first.grads[:, start:stop]
            memory = out if beside is None or first.memory is None else first.memory[:, start:stop]
        else:
            memory = self._scratch.take((count, stop - start, *self.shape[1:]), self.device, self.held_dtype)
            out = memory[:k]
            first.write_rows(out, start, stop)
        for part in rest:
            part.add_rows(out, start, stop)
        if beside is None:
            found = out.flatten(1)
        elif len(memory) == count:
            memory[k].copy_(beside.view(memory.shape[1:]))
            found = memory.flatten(1)
        else:
            found = torch.cat([out.flatten(1), beside.unsqueeze(0).to(out.dtype)])
        if len(self.ranges) == 1:
            self._held = found[:k]
        return found

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        """
        `sum_i coefficients_i s_i`, in the parameter's whole shape, for coefficients of shape `(k,)`, or `None`: all
        are one.
        """
        coefficients = None if coefficients is None else coefficients.to(self.device)
        if self._held is not None and coefficients is not None:
            total = weighted_sum(coefficients, self._held).view(self.shape)
        else:
            total = self.parts[0].combine(coefficients)
            for part in self.parts[1:]:
                part.add_combined(total, coefficients)
        if self._positions is not None:
            total = total.new_zeros(self._whole_shape).index_add_(0, self._positions, total)
        return total

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Add what `combine` returns to `total`, `(rows, *rest)`, which it returns."""
        if self._held is None or self.is_compact:
            return total.add_(self.combine(coefficients))
        coefficients = coefficients.unsqueeze(0).to(self._held)
        add_product(total.view(1, -1), coefficients, self._held)
        return total


def row_ranges(shape: tuple[int, ...], limit: int) -> list[Range]:
    """Ranges of the rows of `shape` of at most `limit` elements, or of one row."""
    step = max(1, limit // max(1, math.prod(shape[1:])))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
