"""Per-sequence gradients of one parameter tensor, in the form in which a layer gets them for the least work.

A parameter of shape `(rows, *rest)` has k sequence gradients of that shape. Few layers need to hold all of them: a
linear layer's are sums of outer products, an embedding's are a few rows each. A form says how to write any range of
rows densely, so that Gram matrix and overlaps can be taken range by range, and how to form a weighted sum directly.
"""

from typing import Protocol

import torch

# Elements of float32 products held at a time where half-precision factors are summed with float32 weights (64 MiB)
_COMBINE_ELEMENTS = 2**24


class SequenceGrads(Protocol):
    """The k sequence gradients of one parameter, from one use of it."""

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Add rows `start:stop` of every sequence's gradient to `out`, `(k, stop - start, *rest)`."""

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Overwrite `out`, `(k, stop - start, *rest)`, with rows `start:stop` of every sequence's gradient."""

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """`sum_i coefficients_i s_i`, `(rows, *rest)`, for `coefficients` of shape `(k,)`."""

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Add what `combine` returns to `total`."""


class Dense:
    """
    Sequence gradients as they are.

    Args:
        grads (`(k, rows, *rest)`): One gradient a sequence.
        owned (`bool`): Whether nobody else holds this memory, so that other uses may be added to it in place.
    """

    def __init__(self, grads: torch.Tensor, owned: bool = False):
        self.grads = grads
        self.owned = owned

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        out += self.grads[:, start:stop]

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        out.copy_(self.grads[:, start:stop])

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        return (coefficients.to(self.grads.dtype) @ self.grads.flatten(1)).view(self.grads.shape[1:])

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor) -> None:
        total += self.combine(coefficients)


class OuterProducts:
    """
    `s_i = sum_t left_it right_it^T`: the weight of a layer that multiplies its inputs by a matrix.

    Products of half-precision factors are summed in float32.

    Args:
        left (`(k, N, rows)`): Factors along the parameter's rows.
        right (`(k, N, columns)`): Factors along its columns.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor):
        if left.dtype != right.dtype:
            dtype = torch.promote_types(left.dtype, right.dtype)
            left, right = left.to(dtype), right.to(dtype)
        # Tensor cores multiply half precision and sum in float32; elsewhere float32 factors give float32 sums
        if not left.is_cuda:
            left, right = left.to(sum_dtype(left)), right.to(sum_dtype(right))
        self.left = left
        self.right = right

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        left = self.left[:, :, start:stop].mT
        if left.dtype == out.dtype:
            torch.baddbmm(out, left, self.right, out=out)
        else:
            out += torch.bmm(left, self.right, out_dtype=out.dtype)

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        left = self.left[:, :, start:stop].mT
        if left.dtype == out.dtype:
            torch.bmm(left, self.right, out=out)
        else:
            out.copy_(torch.bmm(left, self.right, out_dtype=out.dtype))

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        left, right = self.left, self.right
        if left.dtype == sum_dtype(left):
            # One product over all sequences, with the weights on the narrower factor
            scale = coefficients.to(left.dtype).view(-1, 1, 1)
            if left.shape[-1] <= right.shape[-1]:
                left = left * scale
            else:
                right = right * scale
            return left.flatten(0, 1).mT @ right.flatten(0, 1)
        # Half-precision factors would round the weights, so products are summed with them afterwards, by row ranges
        k, _, rows = left.shape
        out = left.new_empty((rows, right.shape[-1]), dtype=torch.float32)
        step = max(1, _COMBINE_ELEMENTS // (k * right.shape[-1]))
        for start in range(0, rows, step):
            products = torch.bmm(left[:, :, start : start + step].mT, right, out_dtype=torch.float32)
            torch.mv(products.flatten(1).mT, coefficients.float(), out=out[start : start + step].view(-1))
        return out

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor) -> None:
        total += self.combine(coefficients)


class Rows:
    """
    `s_i = sum_t e(index_it) value_it^T`: the weight of an embedding.

    Args:
        indices (`(k, N)`): Row of the parameter that each position reads.
        values (`(k, N, *rest)`): Gradient of what it read; zero where the position does not count.
        num_rows (`int`): Number of rows of the parameter.
    """

    def __init__(self, indices: torch.Tensor, values: torch.Tensor, num_rows: int):
        self.indices = indices
        self.values = values
        self.num_rows = num_rows

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        k, rows = out.shape[:2]
        inside = (self.indices >= start) & (self.indices < stop)
        local = torch.where(inside, self.indices - start, 0)
        local = local + torch.arange(k, device=local.device).unsqueeze(1) * rows
        values = self.values
        if start > 0 or stop < self.num_rows:
            values = values * inside.view(*inside.shape, *([1] * (values.dim() - 2)))
        out.view(k * rows, *out.shape[2:]).index_add_(0, local.flatten(), values.flatten(0, 1).to(out.dtype))

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        self.add_rows(out.zero_(), start, stop)

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        out = self.values.new_zeros((self.num_rows, *self.values.shape[2:]), dtype=sum_dtype(self.values))
        self.add_combined(out, coefficients)
        return out

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor) -> None:
        scale = coefficients.to(total.dtype).view(-1, *([1] * (self.values.dim() - 1)))
        total.index_add_(0, self.indices.flatten(), (self.values * scale).flatten(0, 1))

    def compact(self) -> tuple["Rows", torch.Tensor]:
        """
        The same gradients on the rows that occur, renumbered in increasing order, and where those rows lie.

        On CUDA the number of occurring rows is not awaited (that would stall the device): k * N rows are kept, the
        unused ones with zero gradients.
        """
        flat = self.indices.flatten()
        if flat.is_cuda:
            ordered, order = flat.sort()
            first = torch.ones_like(ordered)
            first[1:] = ordered[1:] != ordered[:-1]
            rank = first.cumsum(0) - 1
            rows = torch.zeros_like(ordered).scatter_(0, rank, ordered)
            local = torch.empty_like(flat).scatter_(0, order, rank)
        else:
            rows, local = flat.unique(return_inverse=True)
        return Rows(local.view_as(self.indices), self.values, len(rows)), rows


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which gradients of `tensor` are summed: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
