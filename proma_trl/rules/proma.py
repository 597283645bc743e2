"""PROMA, accumulation-based (arXiv 2601.10498): projects what has been accumulated off the sequences' gradients.

A microbatch holds k sequences. For one parameter tensor let `s_i` be the gradient of sequence i's weighted
log-probability, `a_i` its coefficient in the policy gradient `pg = sum_i a_i s_i`, and `acc` what has been accumulated
since the last optimizer step. PROMA accumulates

    acc  <-  acc - strength * bound(P(acc)) + pg

where `P` projects onto span{s_1, ..., s_k}, exactly (the paper's first version, QR) or by sweeps of one-sequence
projections (its second version, which its experiments use), and `bound` scales a removal longer than `bound * |pg|`
down to that length. `P(acc) = sum_i w_i s_i` is itself a combination of the `s_i`, so that

    new acc = acc + sum_i c_i s_i,    c_i = a_i - strength * factor * w_i,

and `w` follows from the Gram matrix `S_ij = <s_i, s_j>` and the overlaps `b_i = <acc, s_i>` alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..validation import check_choice, check_real, check_whole
from .inner_products import InnerProducts, noise_ratio, rank_tolerance
from .update_rule import UpdateRule

METHODS = ("iterative", "exact", "none")

_TITLE = "PROMA: Projected Microbatch Accumulation for Reference-Free Proximal Policy Updates"
PAPER = {
    "title": _TITLE,
    "id": "2601.10498",
    "citation": f"""\
@article{{abrahamsen2026proma,
    title        = {{{{{_TITLE}}}}},
    author       = {{Nilin Abrahamsen}},
    year         = 2026,
    eprint       = {{arXiv:2601.10498}},
}}""",
}


@dataclass(frozen=True)
class PROMA(UpdateRule):
    """
    Removes from the accumulated gradient what lies in the span of the microbatch's sequence gradients.

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

    needs_gram: ClassVar[bool] = False

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

    @property
    def needs_accumulated(self) -> bool:
        return self.removes

    @property
    def inverts_gram(self) -> bool:
        return self.method == "exact"

    @property
    def name(self) -> str:
        return "PROMA" if self.removes else "REINFORCE"

    @property
    def papers(self) -> tuple[dict[str, str], ...]:
        return (PAPER,) if self.removes else ()

    def coefficients(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        if products.overlaps is None or not self.removes:
            return advantages.expand_as(products.norms_sq)
        projection = self._project(products, advantages)
        return torch.addcmul(advantages, projection.scale.unsqueeze(-1), projection.weights, value=-1)

    def observe(self, products: InnerProducts, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `projection/norm_ratio`: norm of what was removed over the norm of the
            accumulated gradient, all tensors together; `projection/bounded_fraction`: fraction of tensors whose
            removal was bounded; `projection/overlap`: mean absolute cosine between accumulated gradient and sequence
            gradients, over sequences and tensors.
        """
        if products.overlaps is None or not self.removes:
            return {}
        projection = self._project(products, advantages)
        removed = (projection.scale.square() * projection.length_sq).sum()
        accumulated = products.acc_sq.sum().clamp(min=torch.finfo(removed.dtype).tiny)
        return {
            "projection/norm_ratio": (removed / accumulated).sqrt(),
            "projection/bounded_fraction": (projection.factor < 1).to(removed.dtype).mean(),
            "projection/overlap": _cosines(products).mean(),
        }

    def _project(self, products: InnerProducts, advantages: torch.Tensor) -> "_Projection":
        gram, overlaps, norms_sq = products.gram, products.overlaps, _kept_norms_sq(products)
        if self.method == "exact":
            weights = _exact_weights(gram, norms_sq, overlaps, products.rank_tolerance)
        else:
            weights = _iterative_weights(gram, norms_sq, overlaps, self.sweeps)
        # P(acc) = sum_i weights_i s_i: its squared length, and that of the policy gradient
        pair = torch.stack([weights, advantages.expand_as(weights)], -2)
        length_sq, policy_sq = (pair * (pair @ gram)).sum(-1).clamp(min=0).unbind(-1)
        policy_sq = policy_sq if products.policy_sq is None else products.policy_sq
        if self.bound is None:
            factor = torch.ones_like(length_sq)
        else:
            # Where nothing is projected, 0 / 0 is no number, which the minimum passes over
            factor = torch.fmin(self.bound * (policy_sq / length_sq).sqrt(), torch.ones_like(length_sq))
        return _Projection(weights, length_sq, factor, self.strength * factor)


ProjectionSettings = PROMA


@dataclass(frozen=True)
class _Projection:
    """
    The projection of `acc`, for each tensor of a batch `...`.

    Attributes:
        weights (`(..., k)`): `P(acc) = sum_i weights_i s_i`.
        length_sq (`(...)`): `|P(acc)|^2`.
        factor (`(...)`): What the bound leaves of its length, between 0 and 1.
        scale (`(...)`): What bound and strength leave of it.
    """

    weights: torch.Tensor
    length_sq: torch.Tensor
    factor: torch.Tensor
    scale: torch.Tensor


def _kept_norms_sq(products: InnerProducts) -> torch.Tensor:
    """`<s_i, s_i>`, infinite where a sequence is skipped: nothing is divided by a length of zero or rounding noise."""
    norms_sq = products.norms_sq
    longest = norms_sq.amax(-1, keepdim=True)
    return norms_sq.masked_fill(norms_sq <= products.noise_ratio**2 * longest, float("inf"))


def _cosines(products: InnerProducts) -> torch.Tensor:
    """Mean of `|<acc, s_i>| / (|acc| |s_i|)` over the sequences that are not skipped, `(...)`."""
    norms_sq = _kept_norms_sq(products)
    acc_sq = products.acc_sq.unsqueeze(-1)
    active = norms_sq.isfinite() & (acc_sq > 0)
    lengths = (norms_sq * acc_sq).sqrt()
    cosines = torch.where(active, products.overlaps.abs() / torch.where(active, lengths, 1), 0)
    return cosines.sum(-1) / active.sum(-1).clamp(min=1)


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
            that are rounding noise ([`noise_ratio`]) beside the longest.
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
