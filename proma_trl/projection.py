"""The projection, as mathematics on a few k-vectors and k x k matrices.

A microbatch holds k sequences. For one parameter tensor let `s_i` be the gradient of sequence i's weighted
log-probability, `a_i` its coefficient in the policy gradient `pg = sum_i a_i s_i`, and `acc` what has been accumulated
since the last optimizer step. PROMA (arXiv 2601.10498) accumulates

    acc  <-  acc - strength * bound(P(acc)) + pg

where `P` projects onto span{s_1, ..., s_k}, exactly (the paper's first version, QR) or by sweeps of one-sequence
projections (its second version, which its experiments use), and `bound` scales a removal longer than `bound * |pg|`
down to that length. Since `P(acc)` is itself a combination of the `s_i`,

    new acc = acc + sum_i c_i s_i,

and the k numbers `c` follow from the Gram matrix `S_ij = <s_i, s_j>` and the overlaps `b_i = <acc, s_i>` alone:
[`solve`] computes them. Nothing here knows of models, autograd or devices.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

METHODS = ("iterative", "exact", "none")


@dataclass(frozen=True)
class ProjectionSettings:
    """
    What is removed from the accumulated gradient.

    Args:
        method (`str`, defaults to `"iterative"`):
            `"iterative"`: sweeps of one-sequence projections; `"exact"`: the orthogonal projection onto the span of
            the sequence gradients; `"none"`: nothing is removed, which is REINFORCE.
        sweeps (`int`, defaults to `2`):
            Number of sweeps over the sequences. Only `"iterative"` uses it.
        bound (`float` or `None`, defaults to `0.5`):
            Largest norm of the removal, as a multiple of the norm of the microbatch's policy gradient. `None`: no
            bound.
        strength (`float`, defaults to `1.0`):
            Part of the (bounded) projection that is removed, between 0 (REINFORCE) and 1 (PROMA).

    Raises:
        ValueError: If a value is outside its range.
    """

    method: str = "iterative"
    sweeps: int = 2
    bound: float | None = 0.5
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`projection` must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}.")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(
                f"`projection_sweeps` must be a whole number of at least 1, got {self.sweeps!r}. To remove nothing, "
                'set `projection="none"`.'
            )
        if self.bound is not None and not 0 <= self.bound < float("inf"):
            raise ValueError(
                f"`projection_bound` must be a finite number of at least 0, got {self.bound!r}. For an unbounded "
                "projection, set `projection_bound=None`."
            )
        if not 0 <= self.strength <= 1:
            raise ValueError(f"`projection_strength` must lie between 0 and 1, got {self.strength!r}.")

    @property
    def removes(self) -> bool:
        """Whether anything can be removed at all."""
        return self.method != "none" and self.strength > 0 and self.bound != 0


class Solution(NamedTuple):
    """
    Result of [`solve`], for each tensor of the batch `...`.

    Attributes:
        coefficients (`(..., k)`): What to add to the accumulated gradient is `sum_i coefficients_i s_i`.
        removed_sq (`(...)`): Squared norm of what is removed, after bound and strength.
        factor (`(...)`): What the bound left of the removal's length, between 0 and 1.
        norms_sq (`(..., k)`), overlaps (`(..., k)`), acc_sq (`(...)`): `<s_i, s_i>`, `<acc, s_i>` and `<acc, acc>`.
    """

    coefficients: torch.Tensor
    removed_sq: torch.Tensor
    factor: torch.Tensor
    norms_sq: torch.Tensor
    overlaps: torch.Tensor
    acc_sq: torch.Tensor

    @property
    def bounded(self) -> torch.Tensor:
        """Whether the bound shortened the removal, `(...)`, bool."""
        return self.factor < 1

    @property
    def cosine(self) -> torch.Tensor:
        """Mean over the sequences with a non-zero gradient of `|<acc, s_i>| / (|acc| |s_i|)`, `(...)`."""
        active = (self.norms_sq > 0) & (self.acc_sq > 0).unsqueeze(-1)
        lengths = (self.norms_sq * self.acc_sq.unsqueeze(-1)).sqrt()
        cosines = torch.where(active, self.overlaps.abs() / torch.where(active, lengths, 1), 0)
        return cosines.sum(-1) / active.sum(-1).clamp(min=1)


def solve(
    gram: torch.Tensor,
    overlaps: torch.Tensor,
    acc_sq: torch.Tensor,
    advantages: torch.Tensor,
    settings: ProjectionSettings,
    tolerance: float,
) -> Solution:
    """
    Coefficients `c` such that `acc + sum_i c_i s_i` is PROMA's accumulated gradient.

    Args:
        gram (`(..., k, k)`): `<s_i, s_j>`.
        overlaps (`(..., k)`): `<acc, s_i>`.
        acc_sq (`(...)`): `<acc, acc>`; used for the reported cosine only.
        advantages (`(k,)` or `(..., k)`): `a_i`, the coefficients of the policy gradient.
        settings ([`ProjectionSettings`]): What to remove.
        tolerance (`float`): See [`rank_tolerance`]; the exact projection uses it.

    Returns:
        [`Solution`], in the dtype of `gram`.
    """
    norms_sq = gram.diagonal(dim1=-2, dim2=-1)
    if settings.method == "exact":
        weights = _exact_weights(gram, norms_sq, overlaps, tolerance)
    elif settings.method == "iterative":
        weights = _iterative_weights(gram, overlaps, settings.sweeps)
    else:
        weights = torch.zeros_like(overlaps)

    # P(acc) = sum_i weights_i s_i: its squared length, and that of the policy gradient
    advantages = advantages.expand_as(weights)
    pair = torch.stack([weights, advantages], -2)
    projection_sq, policy_sq = (pair * (pair @ gram)).sum(-1).clamp(min=0).unbind(-1)
    if settings.bound is None:
        factor = torch.ones_like(projection_sq)
    else:
        # Of nothing, all is left: the minimum passes over the 0 / 0
        factor = torch.fmin(settings.bound * (policy_sq / projection_sq).sqrt(), torch.ones_like(projection_sq))
    scale = settings.strength * factor
    return Solution(
        coefficients=torch.addcmul(advantages, scale.unsqueeze(-1), weights, value=-1),
        removed_sq=scale.square() * projection_sq,
        factor=factor,
        norms_sq=norms_sq,
        overlaps=overlaps,
        acc_sq=acc_sq,
    )


def _iterative_weights(gram: torch.Tensor, overlaps: torch.Tensor, sweeps: int) -> torch.Tensor:
    """One sweep of `v -= <v, u_i> u_i` over i is forward substitution with the lower triangle of the Gram matrix."""
    # A sequence without a gradient is skipped: its row solves to zero
    system = gram.clone()
    system.diagonal(dim1=-2, dim2=-1).clamp_(min=torch.finfo(gram.dtype).tiny)
    target = overlaps.unsqueeze(-1)
    weights = torch.linalg.solve_triangular(system, target, upper=False)  # it reads that triangle alone
    for _ in range(sweeps - 1):
        weights = weights + torch.linalg.solve_triangular(system, target - gram @ weights, upper=False)
    return weights.squeeze(-1)


def _exact_weights(
    gram: torch.Tensor, norms_sq: torch.Tensor, overlaps: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """The Gram matrix of unit vectors is inverted on the space that they span."""
    inverse = torch.where(norms_sq > 0, norms_sq.clamp(min=0).rsqrt(), 0)
    cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1)
    eigenvalues, vectors = torch.linalg.eigh(cosines)
    keep = eigenvalues > tolerance
    inverted = torch.where(keep, 1 / torch.where(keep, eigenvalues, 1), 0)
    components = vectors.mT @ (overlaps * inverse).unsqueeze(-1)
    return (vectors @ (inverted.unsqueeze(-1) * components)).squeeze(-1) * inverse


def rank_tolerance(k: int, gram: torch.dtype, sequences: torch.dtype) -> float:
    """
    Largest eigenvalue of the unit-diagonal Gram matrix of parallel sequences that is still rounding noise.

    Args:
        k (`int`): Number of sequences.
        gram (`torch.dtype`): Precision in which the Gram matrix was summed; its noise is in the eigenvalues.
        sequences (`torch.dtype`): Precision of the sequence gradients; their noise is in the singular values, the
            eigenvalues' square roots.
    """
    return max(16 * k * torch.finfo(gram).eps, (16 * k * torch.finfo(sequences).eps) ** 2)


def project_exact(vector: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """
    The paper's first version on plain vectors: the orthogonal projection of `vector` onto the rows of `sequences`.

    The rows are normalized first, so that rank means linear independence of directions. A singular value
    decomposition stands where the paper has QR: it gives the same projector, and a rank when rows are parallel.

    Args:
        vector (`(n,)`): What is projected.
        sequences (`(k, n)`): Spanning vectors; zero and parallel ones are allowed.

    Returns:
        `(n,)`: The projection `P(vector)`, to be subtracted.
    """
    directions = _normalized(sequences)
    _, singular, basis = torch.linalg.svd(directions, full_matrices=False)
    tolerance = rank_tolerance(len(sequences), vector.dtype, vector.dtype) ** 0.5
    basis = basis[singular > tolerance]
    return basis.mT @ (basis @ vector)


def project_iterative(vector: torch.Tensor, sequences: torch.Tensor, sweeps: int = 2) -> torch.Tensor:
    """
    The paper's second version on plain vectors: `sweeps` times over the rows, remove the component along each.

    Args:
        vector (`(n,)`): What is projected.
        sequences (`(k, n)`): Vectors whose directions are removed, in this order; zero ones are skipped.
        sweeps (`int`, defaults to `2`): Number of passes over the rows.

    Returns:
        `(n,)`: `P(vector)`, what the sweeps removed.
    """
    rest = vector.clone()
    for _ in range(sweeps):
        for direction in _normalized(sequences):
            rest = rest - (rest @ direction) * direction
    return vector - rest


def _normalized(sequences: torch.Tensor) -> torch.Tensor:
    norms = sequences.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, sequences / torch.where(norms > 0, norms, 1), 0)
