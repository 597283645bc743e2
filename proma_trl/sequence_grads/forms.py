"""Per-sequence gradients of one parameter tensor, in the form in which a layer gets them for the least work.

A parameter of shape `(rows, *rest)` has k sequence gradients of that shape. Few layers need to hold all of them: a
linear layer's are sums of outer products, an embedding's are a few rows each. A form says how to write any range of
rows densely, so that Gram matrix and overlaps can be taken range by range, and how to form a weighted sum directly.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from ..devices import accelerates

# Elements of float32 products held at a time where half-precision factors are summed with float32 weights (64 MiB)
_COMBINE_ELEMENTS = 2**24


class SequenceGrads(Protocol):
    """The k sequence gradients of one parameter, from one use of it."""

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Add rows `start:stop` of every sequence's gradient to `out`, `(k, stop - start, *rest)`."""

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        """Overwrite `out`, `(k, stop - start, *rest)`, with rows `start:stop` of every sequence's gradient."""

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        """`sum_i coefficients_i s_i`, `(rows, *rest)`, for `coefficients` of shape `(k,)`, or `None`: all are one."""

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        """Add what `combine` returns to `total`."""


class Factor(Protocol):
    """
    One of the two factors of a linear layer's weight gradient, seen as a matrix `M` with R rows, those of its tokens:
    the layer's inputs, or the gradients of its outputs; or a batch `...` of such matrices. It is known by its products
    with matrices of few columns.

    Attributes:
        dtype (`torch.dtype`): What products are returned in.
    """

    dtype: torch.dtype

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """`M columns`, `(..., R, c)`, for `columns` of shape `(..., n, c)`."""

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        """`M^T rows`, `(..., n, c)`, for `rows` of shape `(..., R, c)`."""

    def sweep(self, rows: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`M between(M^T rows)`, `(..., R, c)`; `between` keeps the span of its argument, and may be left out."""

    def norms_sq(self) -> torch.Tensor:
        """Squared lengths of the rows, `(..., R)`."""


class TokenFactor(Factor, Protocol):
    """
    A factor whose rows are N tokens of each of k sequences, the first sequence's first.

    Attributes:
        num_tokens (`int`): N.
        first_token (`int`): Place in its sequence, as the model's input has it, of each sequence's first row.
        source (`torch.Tensor` or `None`): The tensor that the layer was given. Layers with the same one have the same
            factor.
    """

    num_tokens: int
    first_token: int
    source: torch.Tensor | None


@runtime_checkable
class LinearGrads(Protocol):
    """
    What the form of a linear layer's weight also has.

    Attributes:
        inputs (`str`): Which factor is the layer's input, `"left"` or `"right"`.
    """

    inputs: str

    def factors(self) -> tuple[TokenFactor, TokenFactor]:
        """The left and the right factor, along the parameter's rows and columns."""


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

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        if coefficients is None:
            return self.grads.sum(0)
        return (coefficients.to(self.grads.dtype) @ self.grads.flatten(1)).view(self.grads.shape[1:])

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        total += self.combine(coefficients)


class OuterProducts:
    """
    `s_i = sum_t left_it right_it^T`: the weight of a layer that multiplies its inputs by a matrix.

    Products of half-precision factors are summed in float32.

    Args:
        left (`(k, N, rows)`): Factors along the parameter's rows.
        right (`(k, N, columns)`): Factors along its columns.
        inputs (`str`, defaults to `"right"`): Which of them is the layer's input, `"left"` or `"right"`.
        all_inputs (`(k, N', columns)`, *optional*): The inputs of all tokens, where `right` has those of each
            sequence's last N alone, as all others have no gradient.
    """

    def __init__(
        self, left: torch.Tensor, right: torch.Tensor, inputs: str = "right", all_inputs: torch.Tensor | None = None
    ):
        self.inputs = inputs
        self._all_inputs = all_inputs
        self._source = left if inputs == "left" else right
        if left.dtype != right.dtype:
            dtype = torch.promote_types(left.dtype, right.dtype)
            left, right = left.to(dtype), right.to(dtype)
        # Tensor cores multiply half precision and sum in float32; elsewhere float32 factors give float32 sums
        if not accelerates(left.device):
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

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        left, right = self.left, self.right
        if coefficients is None:
            return product(left.flatten(0, 1).mT, right.flatten(0, 1))
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

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        total += self.combine(coefficients)

    def factors(self) -> tuple[TokenFactor, TokenFactor]:
        """The left and the right factor, along the parameter's rows and columns."""
        left, right = self.left, self.right
        if self._all_inputs is None:
            source = self._source
            return (
                HeldFactor(left, source=source if self.inputs == "left" else None),
                HeldFactor(right, source=source if self.inputs == "right" else None),
            )
        first = self._all_inputs.shape[1] - left.shape[1]
        return HeldFactor(left, first), HeldFactor(self._all_inputs)


class HeldFactor:
    """
    A [`TokenFactor`] that is in memory.

    Args:
        matrix (`(k, N, n)`): Its rows.
        first_token (`int`), source (`torch.Tensor`, *optional*): See there.
    """

    def __init__(self, matrix: torch.Tensor, first_token: int = 0, source: torch.Tensor | None = None):
        self.num_tokens, self.dtype = matrix.shape[1], sum_dtype(matrix)
        self.first_token = first_token
        self.source = source
        # As in `OuterProducts`
        self._matrix = matrix if accelerates(matrix.device) else matrix.to(self.dtype)

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        return product(self._matrix.flatten(0, 1), columns)

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        # Sequence by sequence: long sums for few results are slow, on a CPU as on a GPU
        rows = rows.view(*self._matrix.shape[:2], -1).to(self._matrix.dtype)
        return batched_product(rows.mT, self._matrix).sum(0).mT

    def sweep(self, rows: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return self.times(between(self.transpose_times(rows)))

    def norms_sq(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self._matrix, dim=-1, dtype=self.dtype).square().flatten()


class StackedFactor:
    """
    The rows of several factors, one factor after another.

    Args:
        factors (`Sequence[Factor]`): Factors of the same columns.
        lengths (`Sequence[int]`): Their numbers of rows.
    """

    def __init__(self, factors: Sequence[Factor], lengths: Sequence[int]):
        self._factors, self._lengths = factors, lengths
        self.dtype = factors[0].dtype

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        return torch.cat([factor.times(columns) for factor in self._factors])

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        pairs = zip(self._factors, rows.split(self._lengths), strict=True)
        return torch.stack([factor.transpose_times(part) for factor, part in pairs]).sum(0)

    def sweep(self, rows: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return self.times(between(self.transpose_times(rows)))

    def norms_sq(self) -> torch.Tensor:
        return torch.cat([factor.norms_sq() for factor in self._factors])


class BatchedFactor:
    """
    A batch of matrices in memory as a [`Factor`].

    Args:
        matrices (`(b, R, n)`): The matrices, in the dtype of their products.
    """

    def __init__(self, matrices: torch.Tensor):
        self.dtype = matrices.dtype
        self._matrices = matrices

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        return self._matrices @ columns

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        return self._matrices.mT @ rows

    def sweep(self, rows: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return self.times(between(self.transpose_times(rows)))

    def norms_sq(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self._matrices, dim=-1).square()


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

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        out = self.values.new_zeros((self.num_rows, *self.values.shape[2:]), dtype=sum_dtype(self.values))
        self.add_combined(out, coefficients)
        return out

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        values = self.values.to(total.dtype)
        if coefficients is not None:
            values = values * coefficients.to(total.dtype).view(-1, *([1] * (values.dim() - 1)))
        total.index_add_(0, self.indices.flatten(), values.flatten(0, 1))

    def compact(self) -> tuple["Rows", torch.Tensor]:
        """
        The same gradients on the rows that occur, renumbered in increasing order, and where those rows lie.

        On CUDA the number of occurring rows is not awaited (that would stall the device): k * N rows are kept, the
        unused ones with zero gradients.
        """
        flat = self.indices.flatten()
        if accelerates(flat.device):
            ordered, order = flat.sort()
            first = torch.ones_like(ordered)
            first[1:] = ordered[1:] != ordered[:-1]
            rank = first.cumsum(0) - 1
            rows = torch.zeros_like(ordered).scatter_(0, rank, ordered)
            local = torch.empty_like(flat).scatter_(0, order, rank)
        else:
            rows, local = flat.unique(return_inverse=True)
        return Rows(local.view_as(self.indices), self.values, len(rows)), rows


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in the precision of `left`, summed, and returned, in [`sum_dtype`]'s."""
    right = right.to(left.dtype)
    return left @ right if left.dtype == sum_dtype(left) else torch.mm(left, right, out_dtype=torch.float32)


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same for batches of matrices of one dtype."""
    return left @ right if left.dtype == sum_dtype(left) else torch.bmm(left, right, out_dtype=torch.float32)


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which gradients of `tensor` are summed: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
