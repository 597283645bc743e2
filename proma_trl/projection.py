"""The names that this module had in version 0.1. [`PROMA`] is the projection, and takes [`InnerProducts`]."""

from typing import NamedTuple

import torch

from .rules.inner_products import InnerProducts, noise_ratio, rank_tolerance
from .rules.proma import PROMA, ProjectionSettings, project_exact, project_iterative

__all__ = [
    "ProjectionSettings",
    "Solution",
    "noise_ratio",
    "project_exact",
    "project_iterative",
    "rank_tolerance",
    "solve",
]


class Solution(NamedTuple):
    """
    Result of [`solve`], for each tensor of the batch `...`.

    Attributes:
        coefficients (`(..., k)`): What to add to the accumulated gradient is `sum_i coefficients_i s_i`.
    """

    coefficients: torch.Tensor


def solve(
    gram: torch.Tensor,
    overlaps: torch.Tensor,
    acc_sq: torch.Tensor,
    advantages: torch.Tensor,
    settings: PROMA,
    tolerance: float,
    noise: float = 0.0,
) -> Solution:
    """`settings.coefficients`, with the fields of [`InnerProducts`] as arguments."""
    products = InnerProducts(gram, overlaps, acc_sq, rank_tolerance=tolerance, noise_ratio=noise)
    return Solution(settings.coefficients(products, advantages))
