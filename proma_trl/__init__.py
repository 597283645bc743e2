"""PROMA (Projected Microbatch Accumulation, arXiv 2601.10498) for TRL."""

from .accumulation import ProjectedAccumulation
from .config import PROMAConfig
from .projection import ProjectionSettings
from .sequence_grads import register_rule
from .trainer import PROMATrainer

__all__ = ["PROMAConfig", "PROMATrainer", "ProjectedAccumulation", "ProjectionSettings", "register_rule"]
