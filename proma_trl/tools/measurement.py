"""What callbacks share that measure something about the policy on the sequences of an optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from trl import GRPOTrainer, RLOOTrainer
from trl.models.utils import disable_gradient_checkpointing


class PolicyMeasurement(TrainerCallback):
    """
    Keeps the microbatches of the optimizer steps that are measured, every few steps, in `self.microbatches`.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): The trainer to which the callback will be added.
        every_steps (`int`): Optimizer steps between two measurements.

    Raises:
        ValueError: If `every_steps` is not positive.
        TypeError: For a trainer that does not sample from its policy.
    """

    def __init__(self, trainer: GRPOTrainer | RLOOTrainer, every_steps: int):
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} has to be at least 1.")
        if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
            raise TypeError(
                f"{type(self).__name__} measures on completions of the policy, so it needs a trainer that samples "
                f"them: a `GRPOTrainer`, `RLOOTrainer` or a subclass, not a `{type(trainer).__name__}`."
            )
        self.trainer = trainer
        self.every_steps = every_steps
        self.microbatches: list[dict[str, Any]] = []

    def is_measured(self, step: int) -> bool:
        """Whether an optimizer step is measured; the first is 1."""
        return step % self.every_steps == 0

    def begin_recording(self, state: TrainerState) -> None:
        """From now on, what the trainer's loss is given is kept. Several callbacks may record."""
        trainer = self.trainer
        recorders = getattr(trainer.compute_loss, "recorders", None)
        if recorders is None:
            compute_loss, recorders = type(trainer).compute_loss, {}

            def recorded(model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> torch.Tensor:
                if model.training:
                    for record in recorders.values():
                        record(inputs)
                return compute_loss(trainer, model, inputs, *rest, **options)

            recorded.recorders = recorders
            trainer.compute_loss = recorded

        def record(inputs: dict[str, Any]) -> None:
            if self.is_measured(state.global_step + 1):
                self.microbatches.append(inputs)

        recorders[self] = record

    def end_recording(self) -> None:
        """The trainer's loss is its own again, unless another callback records."""
        recorders = getattr(self.trainer.compute_loss, "recorders", {})
        recorders.pop(self, None)
        if not recorders:
            self.trainer.__dict__.pop("compute_loss", None)
        self.microbatches = []

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by name."""
        return ((name, param) for name, param in self.trainer.model.named_parameters() if param.requires_grad)

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """Copies of the trained parameters."""
        return {name: param.detach().clone() for name, param in self.trainable()}

    @contextmanager
    def weights(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """The model with other weights, which take the place of its own and are not copied."""
        own = {name: param.data for name, param in self.trainable()}
        try:
            for name, param in self.trainable():
                weights[name] = weights[name].to(param.device, param.dtype)
                param.data = weights[name]
            yield
        finally:
            for name, param in self.trainable():
                param.data = own[name]

    @staticmethod
    def sequences(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A microbatch's tokens and attention mask, `(k, P + T)`, and which of its completions' T places count."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        # Tokens that a tool has answered are not the policy's
        return input_ids, attention_mask, (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()

    @contextmanager
    def as_it_generates(self) -> Iterator[None]:
        """Within the context, the model has neither dropout nor checkpointing."""
        trainer = self.trainer
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
                yield
        finally:
            trainer.model.train(was_training)
