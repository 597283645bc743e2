"""How each kind of layer yields the gradients of the sequences in a microbatch. One file a layer kind."""

from .plan import plan_layers
from .registry import register_rule

__all__ = ["plan_layers", "register_rule"]
