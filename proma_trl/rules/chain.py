"""Rules one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .inner_products import InnerProducts
from .reinforce import REINFORCE
from .update_rule import UpdateRule


class Chain(UpdateRule):
    """
    Each rule takes the coefficients of the one before it in the place of the advantages. PROMA after another rule
    projects, and bounds, relative to that rule's gradient.

    Args:
        rules ([`UpdateRule`]): The rules, in order. Chains among them are flattened.
    """

    def __init__(self, *rules: UpdateRule):
        self.rules = [part for rule in rules for part in (rule.rules if isinstance(rule, Chain) else [rule])]
        self.needs_accumulated = any(rule.needs_accumulated for rule in self.rules)
        self.needs_gram = any(rule.needs_gram for rule in self.rules)
        self.inverts_gram = any(rule.inverts_gram for rule in self.rules)
        self._named = [rule for rule in self.rules if not rule.is_plain] or [REINFORCE()]
        self.name = " and ".join(rule.name for rule in self._named)
        self.papers = tuple(paper for rule in self.rules for paper in rule.papers)

    def coefficients(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        for rule in self._acting(products):
            advantages = rule.coefficients(products, advantages)
        return advantages

    def policy(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        for rule in self._acting(products):
            advantages = rule.policy(products, advantages)
        return advantages

    def observe(self, products: InnerProducts, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        metrics = {}
        for rule in self._acting(products):
            metrics |= rule.observe(products, advantages)
            advantages = rule.coefficients(products, advantages)
        return metrics

    def end_step(self, names: Sequence[str], average: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for rule in self.rules:
            rule.end_step(names, average)

    def state_dict(self) -> dict[str, Any]:
        states = {str(index): rule.state_dict() for index, rule in enumerate(self.rules)}
        return {index: state for index, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, rule in enumerate(self.rules):
            rule.load_state_dict(state.get(str(index), {}))

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag for rule in self._named for tag in rule.tags)

    def without_accumulated(self) -> UpdateRule:
        rules = [rule.without_accumulated() for rule in self.rules]
        return Chain(*rules) if self.needs_gram else super().without_accumulated()

    def _acting(self, products: InnerProducts) -> Iterator[UpdateRule]:
        return (rule for rule in self.rules if products.overlaps is not None or rule.needs_gram)
