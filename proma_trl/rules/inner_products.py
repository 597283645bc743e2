"""What an update rule sees of a parameter tensor: k-vectors and k x k matrices, never the gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InnerProducts:
    """
    Inner products of the gradients of one parameter tensor, or of a batch `...` of tensors.

    A microbatch holds k sequences. `s_i` is the gradient of sequence i's weighted log-probability. With a global
    scope, k counts the sequences of all ranks.

    Args:
        gram (`(..., k, k)`):
            The Gram matrix, `<s_i, s_j>`.
        overlaps (`(..., k)`, *optional*):
            `<acc, s_i>`, where `acc` is what has been accumulated since the last optimizer step. `None` where nothing
            has been accumulated, and for rules that do not need it.
        acc_sq (`(...)`, *optional*):
            `<acc, acc>`; `None` where `overlaps` is.
        policy_sq (`(...)`, *optional*):
            Squared norm of the gradient that is added, where this is not the policy gradient `sum_i a_i s_i` itself
            but what Intra-PROMA left of it.
        names (`Sequence[str]`):
            Names of the parameters: one for a single tensor, or one for each of a batch.
        num_sequences (`int` or scalar, *optional*):
            Number of sequences, without those that only fill up a smaller microbatch. Defaults to k.
        loss_scale (`float` or scalar, defaults to `1.0`):
            What the backward pass multiplied the loss by (1 / number of microbatches, or a gradient scaler's factor):
            `s_i` is that many times the gradient of the sequence's objective.
        rank_tolerance (`float`, defaults to `0.0`):
            See [`rank_tolerance`].
        noise_ratio (`float`, defaults to `0.0`):
            See [`noise_ratio`].
    """

    gram: torch.Tensor
    overlaps: torch.Tensor | None = None
    acc_sq: torch.Tensor | None = None
    policy_sq: torch.Tensor | None = None
    names: Sequence[str] = ("",)
    num_sequences: int | torch.Tensor | None = None
    loss_scale: float | torch.Tensor = 1.0
    rank_tolerance: float = 0.0
    noise_ratio: float = 0.0

    @property
    def norms_sq(self) -> torch.Tensor:
        """`<s_i, s_i>`, `(..., k)`."""
        return self.gram.diagonal(dim1=-2, dim2=-1)

    def length_sq(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Squared norm of `sum_i coefficients_i s_i`, `(...)`, for coefficients of shape `(..., k)`."""
        return (coefficients * (self.gram @ coefficients.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp(min=0)

    @staticmethod
    def stack(products: Sequence[InnerProducts]) -> InnerProducts:
        """One batch of several single tensors of a microbatch, on the device of the first."""
        first = products[0]

        def stacked(name: str) -> torch.Tensor | None:
            values = [getattr(p, name) for p in products]
            return None if values[0] is None else torch.stack([v.to(first.gram.device) for v in values])

        return InnerProducts(
            *(stacked(name) for name in ("gram", "overlaps", "acc_sq", "policy_sq")),
            names=[name for p in products for name in p.names],
            num_sequences=first.num_sequences,
            loss_scale=first.loss_scale,
            rank_tolerance=max(p.rank_tolerance for p in products),
            noise_ratio=max(p.noise_ratio for p in products),
        )


def rank_tolerance(k: int, gram: torch.dtype, sequences: torch.dtype) -> float:
    """
    Largest eigenvalue of the unit-diagonal Gram matrix of parallel sequences that is still rounding noise.

    Rounding to bfloat16 is random: it changes a vector by a fifth of the machine epsilon of its length (1.6e-3), in a
    direction of its own, so that its noise does not grow with k.

    Args:
        k (`int`): Number of sequences.
        gram (`torch.dtype`): Precision in which the Gram matrix was summed; its noise is in the eigenvalues.
        sequences (`torch.dtype`): Precision of the sequence gradients; their noise is in the singular values, the
            eigenvalues' square roots.
    """
    eps = torch.finfo(sequences).eps
    return max(16 * k * torch.finfo(gram).eps, (16 * k * eps if eps < 1e-6 else eps) ** 2)


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
