"""The interface of an update rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from .inner_products import InnerProducts


class UpdateRule(ABC):
    """
    Decides what a microbatch adds to a parameter tensor's accumulated gradient: `sum_i c_i s_i`, with coefficients `c`
    that follow from the tensor's inner products and the advantages.

    A subclass has to implement [`coefficients`] only. A rule that logs or remembers something
    overrides [`observe`]; one that remembers something from one optimizer step to the next also [`end_step`],
    [`state_dict`] and [`load_state_dict`].

    Attributes:
        needs_accumulated (`bool`):
            Whether the rule uses `overlaps` and `acc_sq`, the products with what has been accumulated. If not, they
            are not computed.
        needs_gram (`bool`):
            Whether the rule changes coefficients where nothing has been accumulated yet. If not, the first microbatch
            of an optimizer step takes the advantages as coefficients, and no inner products are formed.
        inverts_gram (`bool`):
            Whether the rule inverts the Gram matrix, whose condition is the square of the sequences'. It is then
            summed in float64 for small tensors.
        name (`str`):
            What the method is called, in model cards. Defaults to the class's name.
        papers (`tuple[dict[str, str], ...]`):
            What to cite: dictionaries with `title`, `id` (arXiv) and `citation` (BibTeX).

    Example:

    ```python
    class NaturalGradient(UpdateRule):
        def coefficients(self, products, advantages):
            ridge = torch.eye(advantages.shape[-1]).to(advantages)
            return torch.linalg.solve(products.gram + ridge, advantages)
    ```
    """

    needs_accumulated: bool = False
    needs_gram: bool = True
    inverts_gram: bool = False
    name: str
    papers: ClassVar[tuple[dict[str, str], ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def coefficients(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        """
        Coefficients of the sequences. It changes no state: it is called for one tensor at a time, in any order.

        Args:
            products ([`InnerProducts`]): Of one tensor, or of a batch `...`.
            advantages (`(k,)` or `(..., k)`): `a_i`, the coefficients of the policy gradient `sum_i a_i s_i`, or what
                the rules before this one made of them.

        Returns:
            `(..., k)`: `c`, in the dtype of `products.gram`.
        """

    def policy(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        """
        The part of the coefficients that weighs the microbatch's own gradient; the rest removes from what has been
        accumulated. Intra-PROMA projects the first part alone. A rule that uses `acc` and also changes the advantages
        overrides this.

        Returns:
            `(..., k)`: In the dtype of `products.gram`.
        """
        if self.needs_accumulated:
            return advantages.expand_as(products.norms_sq)
        return self.coefficients(products, advantages)

    def observe(self, products: InnerProducts, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Called once after a microbatch's backward pass, with the inner products of all its tensors as one batch.

        Returns:
            `dict[str, torch.Tensor]`: Scalars to be logged, averaged over microbatches.
        """
        return {}

    def end_step(  # noqa: B027 - most rules remember nothing
        self, names: Sequence[str], average: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """
        Called after the last microbatch of an optimizer step, on all ranks.

        Args:
            names (`Sequence[str]`): Names of all trainable parameters, the same on all ranks.
            average (`Callable`): Returns the mean of a tensor over ranks. All ranks must call it alike.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for training to go on as if it had not been interrupted."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Takes up the state that [`state_dict`] returned.

        Raises:
            ValueError: If it is not the state of such a rule.
        """
        if state:
            raise ValueError(
                f"`{type(self).__name__}` keeps no state, but was given that of another rule: {[*state]}."
            )

    @property
    def is_plain(self) -> bool:
        """Whether coefficients are always the advantages, so that an ordinary backward pass is enough."""
        return not (self.needs_gram or self.needs_accumulated)

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags for the card of a model that was trained with the rule."""
        return (self.name.lower(),) if self.name else ()

    def without_accumulated(self) -> UpdateRule:
        """The rule as it acts where nothing has been accumulated: on the first microbatch of an optimizer step."""
        from .reinforce import REINFORCE

        return self if self.needs_gram else REINFORCE()
