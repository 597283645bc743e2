"""PROMA (Projected Microbatch Accumulation, arXiv 2601.10498) for TRL."""

from .accumulation import ProjectedAccumulation
from .projection import ProjectionSettings
from .sequence_grads import register_rule

__all__ = ["ProjectedAccumulation", "ProjectionSettings", "register_rule"]
