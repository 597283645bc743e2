"""TRL's `GRPOTrainer` with the projected accumulation beneath it, and with a trust region."""

from .config import PROMAConfig
from .dppo import DPPOConfig, DPPOTrainer
from .proma_trainer import PROMATrainer

__all__ = ["DPPOConfig", "DPPOTrainer", "PROMAConfig", "PROMATrainer"]
