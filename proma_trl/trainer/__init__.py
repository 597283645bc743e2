"""TRL's `GRPOTrainer` with the projected accumulation beneath it, and with a trust region."""

from .versions import check_versions

check_versions()

from .config import PROMAConfig  # noqa: E402
from .dppo import DPPOConfig, DPPOTrainer  # noqa: E402
from .proma_trainer import PROMATrainer  # noqa: E402

__all__ = ["DPPOConfig", "DPPOTrainer", "PROMAConfig", "PROMATrainer"]
