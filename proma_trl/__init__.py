"""
PROMA (Projected Microbatch Accumulation, arXiv 2601.10498) for TRL.

The package's README follows one parameter tensor through a backward pass. Names load what they need: the accumulation
and its rules load torch and accelerate, the configurations and trainers also TRL.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._moved import MovedModules

if TYPE_CHECKING:
    from .accumulation import ProjectedAccumulation
    from .intra import IntraPROMA
    from .rules import PROMA, REINFORCE, Chain, InnerProducts, UpdateRule
    from .rules.proma import ProjectionSettings
    from .sequence_grads import register_rule
    from .trainer import DPPOConfig, DPPOTrainer, PROMAConfig, PROMATrainer
    from .trust_region import TrustRegion

__version__ = "0.2.0"

_HOMES = {
    "Chain": "rules",
    "DPPOConfig": "trainer",
    "DPPOTrainer": "trainer",
    "InnerProducts": "rules",
    "IntraPROMA": "intra",
    "PROMA": "rules",
    "PROMAConfig": "trainer",
    "PROMATrainer": "trainer",
    "ProjectedAccumulation": "accumulation",
    "ProjectionSettings": "rules.proma",
    "REINFORCE": "rules",
    "TrustRegion": "trust_region",
    "UpdateRule": "rules",
    "register_rule": "sequence_grads",
}

__all__ = [
    "Chain",
    "DPPOConfig",
    "DPPOTrainer",
    "InnerProducts",
    "IntraPROMA",
    "PROMA",
    "PROMAConfig",
    "PROMATrainer",
    "ProjectedAccumulation",
    "ProjectionSettings",
    "REINFORCE",
    "TrustRegion",
    "UpdateRule",
    "register_rule",
]

sys.meta_path.append(MovedModules(__name__))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
