"""How each kind of layer yields the gradients of the sequences in a microbatch. One file a layer kind."""

from . import embedding, linear, norm  # noqa: F401 - registers their rules
from .registry import register_rule

__all__ = ["register_rule"]
