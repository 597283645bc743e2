"""Update rules: from a tensor's inner products and the advantages to coefficients. One file a rule."""

from .chain import Chain
from .inner_products import InnerProducts
from .proma import PROMA
from .reinforce import REINFORCE
from .update_rule import UpdateRule

__all__ = ["PROMA", "REINFORCE", "Chain", "InnerProducts", "UpdateRule"]
