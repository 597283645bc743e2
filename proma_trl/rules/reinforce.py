"""REINFORCE: the policy gradient, unchanged."""

import torch

from .inner_products import InnerProducts
from .update_rule import UpdateRule


class REINFORCE(UpdateRule):
    """Coefficients are the advantages: `acc += sum_i a_i s_i`."""

    needs_gram = False
    name = "REINFORCE"

    def coefficients(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        return advantages.expand_as(products.norms_sq)
