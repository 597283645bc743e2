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

from .validation import check_choice, check_real, check_whole

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
        check_choice("method", self.method, METHODS)
        check_whole("sweeps", self.sweeps, 'To remove nothing, set `method="none"`.')
        if self.bound is not None:
            way_out = "For an unbounded projection, set `bound=None`."
            check_real("bound", self.bound, "a finite number of at least 0", way_out=way_out)
        check_real("strength", self.strength, "a number between 0 and 1", high=1.0)

    @property
    def removes(self) -> bool:
        """Whether anything can be removed at all."""
        return self.method != "none" and self.strength > 0 and self.bound != 0


class Solution(NamedTuple):
    """
    Result of [`solve`], for each tensor of the batch `...`.

    Attributes:
        coefficients (`(..., k)`): What to add to the accumulated gradient is `sum_i coefficients_i s_i`.
        projection_sq (`(...)`): Squared norm of the projection `P(acc)`.
        factor (`(...)`): What the bound left of the removal's length, between 0 and 1.
        scale (`(...)`): What bound and strength left of it.
        norms_sq (`(..., k)`), overlaps (`(..., k)`), acc_sq (`(...)`): `<s_i, s_i>` (infinite where s_i was skipped),
            `<acc, s_i>` and `<acc, acc>`.
    """

    coefficients: torch.Tensor
    projection_sq: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor
    norms_sq: torch.Tensor
    overlaps: torch.Tensor
    acc_sq: torch.Tensor

    @property
    def removed_sq(self) -> torch.Tensor:
        """Squared norm of what is removed, after bound and strength, `(...)`."""
        return self.scale.square() * self.projection_sq

    @property
    def bounded(self) -> torch.Tensor:
        """Whether the bound shortened the removal, `(...)`, bool."""
        return self.factor < 1

    @property
    def cosine(self) -> torch.Tensor:
        """Mean over the sequences that were not skipped of `|<acc, s_i>| / (|acc| |s_i|)`, `(...)`."""
        active = self.norms_sq.isfinite() & (self.acc_sq > 0).unsqueeze(-1)
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
    noise: float = 0.0,
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
        noise (`float`): See [`noise_ratio`]; shorter sequence gradients are skipped.

    Returns:
        [`Solution`], in the dtype of `gram`.
    """
    norms_sq = gram.diagonal(dim1=-2, dim2=-1)
    # Nothing is divided by a length of zero or of rounding noise: it counts as infinite
    norms_sq = norms_sq.masked_fill(norms_sq <= noise**2 * norms_sq.amax(-1, keepdim=True), float("inf"))
    if settings.method == "exact":
        weights = _exact_weights(gram, norms_sq, overlaps, tolerance)
    elif settings.method == "iterative":
        weights = _iterative_weights(gram, norms_sq, overlaps, settings.sweeps)
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
        projection_sq=projection_sq,
        factor=factor,
        scale=scale,
        norms_sq=norms_sq,
        overlaps=overlaps,
        acc_sq=acc_sq,
    )


def _iterative_weights(
    gram: torch.Tensor, norms_sq: torch.Tensor, overlaps: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """One sweep of `v -= <v, u_i> u_i` over i is forward substitution with the lower triangle of the Gram matrix."""
    system = gram.clone()
    system.diagonal(dim1=-2, dim2=-1).copy_(norms_sq)
    target = overlaps.unsqueeze(-1)
    weights = torch.linalg.solve_triangular(system, target, upper=False)  # it reads that triangle alone
    for _ in range(sweeps - 1):
        weights = weights + torch.linalg.solve_triangular(system, target - gram @ weights, upper=False)
    return weights.squeeze(-1)


def _exact_weights(
    gram: torch.Tensor, norms_sq: torch.Tensor, overlaps: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """The Gram matrix of unit vectors is inverted on the space that they span."""
    inverse = norms_sq.rsqrt()
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


def noise_ratio(precision: torch.dtype) -> float:
    """
    The length, relative to the longest sequence gradient of a tensor, below which a sequence gradient is taken for
    rounding noise, whose direction is random: 1.1e-13 in float64, 6.1e-5 in float32, 9.8e-4 in float16, 7.8e-3 in
    bfloat16.

    A sequence that repeats one token has no gradient in queries and keys. What rounding leaves there was measured at
    2 to 46 times the machine epsilon of float32 and float64, growing with the length (6 to 512 tokens).

    Args:
        precision (`torch.dtype`): Lowest precision of the products that sequence gradients come from.
    """
    eps = torch.finfo(precision).eps
    return 512 * eps if eps < 1e-6 else eps


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
        sequences (`(k, n)`): Vectors whose directions are removed, in this order; zero ones are skipped, and those
            that are [rounding noise](noise_ratio) beside the longest.
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
    kept = norms > noise_ratio(sequences.dtype) * norms.amax()
    return torch.where(kept, sequences / torch.where(kept, norms, 1), 0)
