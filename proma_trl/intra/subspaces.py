"""Dominant subspaces of tall matrices by randomized subspace iteration: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import nn

from ..devices import widest_dtype
from ..sequence_grads.forms import Factor

# Products with matrices of 16 columns are several times as fast as with 10: sketches are filled up with zero columns
_COLUMNS = 16


def fill_up(noise: torch.Tensor) -> torch.Tensor:
    """`(..., d)` with zero columns at the end, which change no result and make products fast."""
    return nn.functional.pad(noise, (0, -noise.shape[-1] % _COLUMNS))


def dominant_subspace(factor: Factor, rows: torch.Tensor, weights: torch.Tensor, iterations: int) -> torch.Tensor:
    """
    An orthonormal basis of a subspace that holds most of the rows of a matrix (arXiv 2601.10498 v4): `orth(Y)` with
    `Y = X^T noise`, and then, `iterations` times, `Y = X^T (X Y)`. Only the span of a sketch matters, so it is
    orthonormalized between products, which keeps small singular directions above the rounding of large ones.

    Args:
        factor ([`Factor`]): R rows of size n, or a batch `...` of as many.
        rows (`(..., R, d)`): A standard normal matrix, its rows multiplied by `weights`.
        weights (`(..., R, 1)`): X is the factor, its rows multiplied by these.
        iterations (`int`): Number of power iterations.

    Returns:
        `(..., n, d)`: Orthonormal columns and zero columns. There are as many orthonormal ones as X has independent
        rows, at most d.
    """
    for _ in range(iterations):
        # `X^T rows` is the factor's product with the rows weighted once more
        rows = _orthonormalize_weighted(factor.sweep(rows, orthonormalize), weights, factor.operand_dtype)
    return orthonormalize(factor.transpose_times(rows))


def captured_share(factor: Factor, basis: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Share of the squared norm of the factor's weighted rows that lies in the span of `basis`, `(...)`."""
    captured = (factor.times(basis) * weights).square().sum((-2, -1))
    total = (factor.norms_sq() * weights.squeeze(-1).square()).sum(-1)
    return captured / total.clamp(min=torch.finfo(total.dtype).tiny)


def orthonormalize(columns: torch.Tensor) -> torch.Tensor:
    """
    Columns with the same span that are orthonormal, or zero where they depend on those before them.

    Args:
        columns (`(..., n, d)`): Any columns, zero and parallel ones among them.

    Returns:
        `(..., n, d)`: In the same dtype.
    """
    return _orthonormal(columns.to(widest_dtype(columns.device)), columns.dtype).to(columns.dtype)


def _orthonormalize_weighted(columns: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same of columns whose rows are multiplied by `weights`, `(..., n, 1)`, before and after; in `dtype`."""
    wide = torch.empty_like(columns, dtype=widest_dtype(columns.device))
    found = _orthonormal(torch.mul(columns, weights, out=wide), columns.dtype)
    return torch.mul(found, weights, out=torch.empty_like(found, dtype=dtype))


def _orthonormal(columns: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """
    A Cholesky factorization of the d x d Gram matrix in float64 takes the place of QR. It neither iterates over
    columns nor makes the host wait for the device. What `columns` come from was computed in `precision`.
    """
    eps = torch.finfo(columns.dtype).eps
    gram = columns.mT @ columns
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    longest_sq = diagonal.amax(-1, keepdim=True)
    # A little more than rounding may take away from it, so that the factorization exists
    diagonal.add_(longest_sq, alpha=4 * gram.shape[-1] * eps)
    triangle, _ = torch.linalg.cholesky_ex(gram)
    # On its diagonal: each column's distance from the span of those before it. Where all columns are zero, there is no
    # factorization, and nothing is kept
    tolerance = max(16 * torch.finfo(precision).eps, 64 * eps**0.5)
    kept = triangle.diagonal(dim1=-2, dim2=-1).square() > tolerance**2 * longest_sq
    identity = torch.eye(gram.shape[-1], dtype=columns.dtype, device=columns.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=False)
    return columns @ torch.where(kept.unsqueeze(-2), inverse.mT, 0)
