"""ISOPO, Isometric Policy Optimization (arXiv 2512.23353): shrinks coefficients of sequences with a long gradient.

With the Gram matrix `S_ij = <s_i, s_j>` of a tensor's k sequence gradients and the coefficients `a` of its policy
gradient, the microbatch's gradient becomes `sum_i c_i s_i`:

    natural   c = R (S + R I)^-1 a                R = regularization * mean of tr(S) / k
    norm      c_i = a_i / sqrt(x_i^2 / R + 1)     R = regularization * mean of x_i^2,  x_i^2 = S_ii
    fisher    the same with x_i^2 = (S^2)_ii / tr(S), the squared length of s_i in the Fisher metric that the
              microbatch's sequences estimate

Means are running means over optimizer steps, one for each tensor. As regularization grows, `c` becomes `a`: REINFORCE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ..validation import check_choice, check_real
from .inner_products import InnerProducts
from .update_rule import UpdateRule

METHODS = ("natural", "norm", "fisher")

# Part of a running mean that an optimizer step keeps
_DECAY = 0.9

_TITLE = "ISOPO: Proximal policy gradients without pi-old"
_PAPER = {
    "title": _TITLE,
    "id": "2512.23353",
    "citation": f"""\
@article{{abrahamsen2025isopo,
    title        = {{{{{_TITLE}}}}},
    author       = {{Nilin Abrahamsen}},
    year         = 2025,
    eprint       = {{arXiv:2512.23353}},
}}""",
}


class ISOPO(UpdateRule):
    """
    Transforms the advantages of a microbatch, tensor by tensor, by the lengths of its sequence gradients.

    Running means are kept for each tensor: they decay by 0.9 an optimizer step, towards the mean over the step's
    microbatches and ranks. In a tensor's first step, and as long as its gradients have all been zero, a microbatch's
    own value takes their place. Steps with gradients that are not finite leave them as they are.

    Args:
        method (`str`, defaults to `"natural"`):
            `"natural"`, `"norm"` or `"fisher"`: see above.
        regularization (`float`, defaults to `1.0`):
            R as a multiple of the running mean: positive. The larger, the closer to REINFORCE.

    Raises:
        ValueError: If a value is outside its range.
    """

    name = "ISOPO"
    papers: ClassVar[tuple[dict[str, str], ...]] = (_PAPER,)

    def __init__(self, method: str = "natural", regularization: float = 1.0):
        check_choice("method", method, METHODS)
        check_real("regularization", regularization, "a positive, finite number", low=sys.float_info.min)
        self.method = method
        self.regularization = regularization
        self.inverts_gram = method == "natural"
        # Running means by tensor, 0 where there is none; in the units of losses that are not scaled
        self._means = torch.zeros(0)
        self._places: dict[str, int] = {}
        self._observed: list[tuple[Sequence[str], torch.Tensor]] = []

    def coefficients(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        advantages = advantages.expand_as(products.norms_sq)
        ridge = self._ridge(products).unsqueeze(-1)
        acts = ridge > 0
        ridge = torch.where(acts, ridge, 1)
        if self.method == "natural":
            system = products.gram + torch.diag_embed(ridge.expand_as(advantages))
            # Without checks, which would wait for the device: the system is positive definite
            solution, _ = torch.linalg.solve_ex(system, advantages.unsqueeze(-1))
            found = ridge * solution.squeeze(-1)
        else:
            found = advantages * (_lengths_sq(products, self.method) / ridge + 1).rsqrt()
        return torch.where(acts, found, advantages)

    def observe(self, products: InnerProducts, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `isopo/coefficient_ratio`: norm of the coefficients over the norm of the
            advantages, averaged over tensors; `isopo/below_regularization`: fraction of the Gram matrix's eigenvalues
            (`"natural"`), or of the squared lengths (`"norm"`, `"fisher"`), that are below R: these are hardly shrunk.
        """
        self._observed.append((products.names, self._own_mean(products) / products.loss_scale**2))
        before = advantages.expand_as(products.norms_sq).norm(dim=-1)
        ratios = self.coefficients(products, advantages).norm(dim=-1) / before
        natural, count = self.method == "natural", _count(products)
        values = torch.linalg.eigvalsh(products.gram) if natural else _lengths_sq(products, self.method)
        below = (values < self._ridge(products).unsqueeze(-1)).sum(-1)
        # Sequences that fill up smaller microbatches have no gradients
        filled_up = values.shape[-1] - count
        return {
            "isopo/coefficient_ratio": torch.where(before > 0, ratios, 1).mean(),
            "isopo/below_regularization": ((below - filled_up).clamp(min=0) / count).mean(),
        }

    def end_step(self, names: Sequence[str], average: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self._observed:
            return
        places = {name: place for place, name in enumerate(names)}
        first = self._observed[0][1]
        sums = first.new_zeros((2, len(places)))
        for observed, values in self._observed:
            index = torch.tensor([places[name] for name in observed], device=first.device)
            sums.index_add_(1, index, torch.stack([values.to(first), torch.ones_like(values)]))
        self._observed.clear()
        total, count = average(sums)
        kept = first.new_zeros(len(places))
        for name, place in self._places.items():
            if name in places:
                kept[places[name]] = self._means[place]
        new = total / count
        decayed = torch.where(kept > 0, _DECAY * kept + (1 - _DECAY) * new, new)
        self._means = torch.where(new.isfinite(), decayed, kept)
        self._places = places

    def state_dict(self) -> dict[str, Any]:
        if not self._places:
            return {}
        means = self._means.tolist()
        return {"means": {name: means[place] for name, place in self._places.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() - {"means"}:
            raise ValueError(f"This is not the state of ISOPO, but holds {[*state]}.")
        means = state.get("means", {})
        self._places = {name: place for place, name in enumerate(means)}
        self._means = torch.tensor([*means.values()], dtype=torch.float64)
        self._observed.clear()

    def _ridge(self, products: InnerProducts) -> torch.Tensor:
        """R for each tensor, `(...)`: 0 where all its gradients are and have been zero."""
        own = self._own_mean(products)
        if not self._places:
            return self.regularization * own
        self._means = self._means.to(own)
        places = [self._places.get(name) for name in products.names]
        means = torch.stack([own.new_zeros(()) if place is None else self._means[place] for place in places])
        means = means.view_as(own) * products.loss_scale**2
        return self.regularization * torch.where(means > 0, means, own)

    def _own_mean(self, products: InnerProducts) -> torch.Tensor:
        """The microbatch's mean of `x_i^2`, `(...)`."""
        return _lengths_sq(products, self.method).sum(-1) / _count(products)


def _lengths_sq(products: InnerProducts, method: str) -> torch.Tensor:
    """`x_i^2`, `(..., k)`."""
    norms_sq = products.norms_sq
    if method != "fisher":
        return norms_sq
    trace = norms_sq.sum(-1, keepdim=True)
    return products.gram.square().sum(-1) / torch.where(trace > 0, trace, 1)


def _count(products: InnerProducts) -> int | torch.Tensor:
    return products.gram.shape[-1] if products.num_sequences is None else products.num_sequences
