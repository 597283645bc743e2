"""Per-sequence gradients of one parameter tensor, in the form in which a layer gets them for the least work.

A parameter of shape `(rows, *rest)` has k sequence gradients of that shape. Few layers need to hold all of them: a
linear layer's are sums of outer products, an embedding's are a few rows each. A form says how to write any range of
rows densely, so that Gram matrix and overlaps can be taken range by range, and how to form a weighted sum directly.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from ..devices import accelerates

# Elements of float32 products held at a time where half-precision factors are summed with float32 weights (64 MiB)
_COMBINE_ELEMENTS = 2**24


class SequenceGrads(Protocol):
    """
    The k sequence gradients of one parameter, from one use of it.

    Attributes:
        dtype (`torch.dtype` or `None`): What they are held in, see [`held_dtype`]; `None` if other uses decide that.
    """

    dtype: torch.dtype | None

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
        operand_dtype (`torch.dtype`): What it is multiplied with is cast to this.
    """

    dtype: torch.dtype
    operand_dtype: torch.dtype

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
    A factor whose rows are N tokens of each of k sequences, the first sequence's first, or some of these.

    Attributes:
        num_tokens (`int`): N.
        first_token (`int`): Place in its sequence, as the model's input has it, of each sequence's first token.
        rows (`(R,)` or `None`): Which of the k * N tokens the rows are, if not all.
        source (`torch.Tensor` or `None`): The tensor that the layer was given. Layers with the same one have the same
            factor.
    """

    num_tokens: int
    first_token: int
    rows: torch.Tensor | None
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
        memory (`(k + 1, rows, *rest)`, *optional*): What `grads` is the beginning of, where a gradient more has room.
    """

    def __init__(self, grads: torch.Tensor, owned: bool = False, memory: torch.Tensor | None = None):
        self.grads = grads
        self.owned = owned
        self.memory = memory
        self.dtype = held_dtype(grads)

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        out += self.grads[:, start:stop]

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        out.copy_(self.grads[:, start:stop])

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        if coefficients is None:
            return self.grads.sum(0, dtype=sum_dtype(self.grads))
        return weighted_sum(coefficients, self.grads.flatten(1).to(self.dtype)).view(self.grads.shape[1:])

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        total += self.combine(coefficients)


class OuterProducts:
    """
    `s_i = sum_t left_it right_it^T`: the weight of a layer that multiplies its inputs by a matrix.

    Products of half-precision factors are summed in float32. On an accelerator, each sequence's sum of products of
    bfloat16 factors is then rounded to bfloat16, as an ordinary step under autocast rounds its gradient.

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
        self.dtype = held_dtype(left)

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
            torch.bmm(left, self.right, out_dtype=out.dtype, out=out)

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        left, right = self.left, self.right
        if coefficients is None:
            return product(left.flatten(0, 1).mT, right.flatten(0, 1))
        if left.dtype != torch.float16:
            # One product over all sequences, with the weights on the narrower factor
            if left.shape[-1] <= right.shape[-1]:
                left = _weighted(left, coefficients)
            else:
                right = _weighted(right, coefficients)
            return product(left.flatten(0, 1).mT, right.flatten(0, 1))
        # Float16 is too narrow for weighted factors, so products are summed with them afterwards, by row ranges
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


class Segments:
    """
    Where the tokens of k sequences lie in tensors `(R, ...)` that hold some of each, the first sequence's first.

    Args:
        counts (`Sequence[int]`): How many of each.
        sequence (`(R,)`): Which sequence each token is of.
    """

    def __init__(self, counts: Sequence[int], sequence: torch.Tensor):
        ends = itertools.accumulate(counts)
        self.slices = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        self._sequence = sequence

    def sums(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each sequence's sum of a tensor `(R, n)`: `(k, n)`."""
        places = torch.arange(len(self.slices), device=tensor.device).unsqueeze(1)
        return product((places == self._sequence).to(tensor.dtype), tensor)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """One number a token, `(R,)`, from one a sequence, `(k,)`."""
        return values.index_select(0, self._sequence)


class SegmentProducts:
    """
    [`OuterProducts`] of sequences of different lengths, without filling up.

    Args:
        left (`(R, rows)`), right (`(R, columns)`): The factors of all sequences.
        segments ([`Segments`]): Which sequence they are of.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, segments: Segments):
        self.left, self.right, self.segments = left, right, segments
        self.dtype = held_dtype(left)

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        for total, some in zip(out, self.segments.slices, strict=True):
            add_product(total, self.left[some, start:stop].mT, self.right[some])

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        for total, some in zip(out, self.segments.slices, strict=True):
            left, right = self.left[some, start:stop].mT, self.right[some]
            if total.dtype == left.dtype:
                torch.mm(left, right, out=total)
            else:
                torch.mm(left, right, out_dtype=total.dtype, out=total)

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        left, right = self.left, self.right
        if coefficients is not None:
            right = torch.mul(right, self.segments.spread(coefficients).unsqueeze(1), out=torch.empty_like(right))
        return product(left.mT, right)

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        total += self.combine(coefficients)


class HeldFactor:
    """
    A [`TokenFactor`] that is in memory, with all tokens.

    Args:
        matrix (`(k, N, n)`): Its rows.
        first_token (`int`), source (`torch.Tensor`, *optional*): See there.
    """

    rows = None

    def __init__(self, matrix: torch.Tensor, first_token: int = 0, source: torch.Tensor | None = None):
        self.num_tokens, self.dtype = matrix.shape[1], sum_dtype(matrix)
        self.first_token = first_token
        self.source = source
        # As in `OuterProducts`
        self._matrix = matrix if accelerates(matrix.device) else matrix.to(self.dtype)
        self.operand_dtype = self._matrix.dtype

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        return product(self._matrix.flatten(0, 1), columns)

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        # Sequence by sequence: long sums for few results are slow, on a CPU as on a GPU
        rows = rows.view(*self._matrix.shape[:2], rows.shape[-1]).to(self._matrix.dtype)
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
        self.dtype, self.operand_dtype = factors[0].dtype, factors[0].operand_dtype

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
        self.dtype = self.operand_dtype = matrices.dtype
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

    dtype = None

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
        local, values = local.flatten(), values.flatten(0, 1)
        if out.dtype.itemsize < values.dtype.itemsize:
            # The values of one row are added up before they are rounded
            local, places = _distinct(local)
            values = values.new_zeros((len(local), *values.shape[1:])).index_add_(0, places, values)
        out.view(k * rows, *out.shape[2:]).index_add_(0, local, values.to(out.dtype))

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
        The same gradients on the rows that occur, renumbered in increasing order, and where those rows lie: on an
        accelerator k * N rows, the unused ones with zero gradients.
        """
        rows, local = _distinct(self.indices.flatten())
        return Rows(local.view_as(self.indices), self.values, len(rows)), rows


def _distinct(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The distinct ones of some numbers `(n,)` in increasing order, and each number's place among them. An accelerator's
    count of them is not awaited: it returns n numbers, of which the last are zeros.
    """
    if not accelerates(values.device):
        return values.unique(return_inverse=True)
    ordered, order = values.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    rank = first.cumsum(0) - 1
    places = torch.empty_like(values).scatter_(0, order, rank)
    return torch.zeros_like(ordered).scatter_(0, rank, ordered), places


def _weighted(factor: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """`(k, N, n)` times `(k,)`, in the dtype of `factor`."""
    scale = coefficients.to(sum_dtype(factor)).view(-1, 1, 1)
    return torch.mul(factor, scale, out=torch.empty_like(factor))


def weighted_sum(coefficients: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """`sum_i coefficients_i vectors_i`, `(n,)` in [`sum_dtype`]'s, for vectors of shape `(k, n)`."""
    return product(coefficients.unsqueeze(0).to(vectors.dtype), vectors).squeeze(0)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total` in place, summed in the wider one of their precisions."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in the precision of `left`, summed, and returned, in [`sum_dtype`]'s."""
    right = right.to(left.dtype)
    return left @ right if left.dtype == sum_dtype(left) else torch.mm(left, right, out_dtype=torch.float32)


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same for batches of matrices of one dtype."""
    return left @ right if left.dtype == sum_dtype(left) else torch.bmm(left, right, out_dtype=torch.float32)


def held_dtype(tensor: torch.Tensor) -> torch.dtype:
    """
    What sequence gradients are held in that are products of `tensor`: [`sum_dtype`]'s, but bfloat16 on an accelerator,
    where moving them takes longer than forming them. All sums over their elements are float32 nevertheless.
    """
    half = tensor.dtype == torch.bfloat16 and accelerates(tensor.device)
    return torch.bfloat16 if half else sum_dtype(tensor)


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which gradients of `tensor` are summed: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
