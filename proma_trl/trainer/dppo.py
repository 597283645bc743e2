"""`DPPOConfig` and `DPPOTrainer`: the trust region of DPPO by itself, or beneath a projection."""

from dataclasses import dataclass, field
from typing import ClassVar

from .config import PROMAConfig
from .proma_trainer import PROMATrainer


@dataclass
class DPPOConfig(PROMAConfig):
    r"""
    Configuration class for the [`DPPOTrainer`].

    It has [`PROMAConfig`]'s parameters with other defaults: a trust region and no projection. With a `projection`, an
    `isopo` or an `intra_dim`, these act on the gradients of the tokens that the trust region leaves.

    Parameters:
        divergence (`str`, *optional*, defaults to `"binary_tv"`):
            What the trust region is measured by; see [`PROMAConfig`].
        projection (`str`, *optional*, defaults to `"none"`):
            PROMA's projection; see [`PROMAConfig`].
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Number of microbatches in an optimizer step.
    """

    _method: ClassVar[str] = "DPPO"

    divergence: str | None = field(
        default="binary_tv", metadata=PROMAConfig.__dataclass_fields__["divergence"].metadata
    )
    projection: str = field(default="none", metadata=PROMAConfig.__dataclass_fields__["projection"].metadata)
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Number of microbatches in an optimizer step."}
    )

    def __post_init__(self) -> None:
        if self.divergence is None:
            raise ValueError(
                "`divergence=None` leaves DPPO without its trust region. Choose one, such as "
                '`divergence="binary_tv"`, or use `PROMAConfig`.'
            )
        super().__post_init__()


class DPPOTrainer(PROMATrainer):
    """
    Trainer for DPPO, introduced in [Rethinking the Trust Region in LLM Reinforcement
    Learning](https://huggingface.co/papers/2602.04879).

    It takes [`~trl.GRPOTrainer`]'s arguments, with a [`DPPOConfig`] as `args`. In the place of clipping ratios, it
    masks tokens at which the divergence from the policy that sampled exceeds a threshold and an update would increase
    it.

    Example:

    ```python
    from datasets import load_dataset
    from proma_trl import DPPOConfig, DPPOTrainer
    from trl.rewards import accuracy_reward

    trainer = DPPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=DPPOConfig(steps_per_generation=8),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "dppo", "proma-trl"]
    _name = "DPPO"
    _config_class: ClassVar[type[PROMAConfig]] = DPPOConfig
