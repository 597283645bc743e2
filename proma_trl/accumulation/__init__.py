"""The accumulation: from a captured forward pass to the gradients that a backward pass emits. Knows torch, not TRL."""

from .accumulation import ProjectedAccumulation

__all__ = ["ProjectedAccumulation"]
