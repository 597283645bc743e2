"""How each kind of layer yields the gradients of the sequences in a microbatch. One file a layer kind."""

from .plan import Planned, head_weights, plan_layers, plan_linear_layers, plan_modules
from .registry import register_rule

__all__ = ["Planned", "head_weights", "plan_layers", "plan_linear_layers", "plan_modules", "register_rule"]
