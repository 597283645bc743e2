"""TRL's trainer with an update rule: the configuration, the loss, the fused head, checks, checkpoints, model cards."""

from .config import PROMAConfig
from .proma_trainer import PROMATrainer

__all__ = ["PROMAConfig", "PROMATrainer"]
