"""What is left of the projection after the optimizer: how far parameter updates follow single sequences' gradients."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from ..backends import weights_are_sharded
from .data import has_images
from .measurement import PolicyMeasurement


class UpdateOverlap(PolicyMeasurement):
    r"""
    Logs the squared cosines between the parameter update of an optimizer step and the gradients, before it, of the
    log-probabilities of the step's sequences: means over sequences, between 0 and 1.

    - `update/overlap`: with all parameters as one vector;
    - `update/tensor_overlap`: tensor by tensor, as PROMA projects, averaged over the tensors that have a gradient;
    - `update/last_tensor_overlap`: the same for the sequences of the step's last microbatch, off which PROMA has
      projected all that earlier ones accumulated.

    PROMA makes gradients orthogonal to sequences' directions. An optimizer that scales each parameter by itself, as
    AdamW does, takes part of that back, and so does its momentum.

    **Cost.** A measured step takes a forward and a backward pass of each of its sequences, one at a time, two more
    copies of the trainable weights, and a gradient.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]):
            The trainer to which the callback will be added: TRL's own, [`PROMATrainer`] or another subclass.
        every_steps (`int`, *optional*, defaults to `1`):
            Optimizer steps between two measurements.

    Raises:
        ValueError: For a number that is not positive; when training begins, for prompts with images.
        TypeError: For a trainer that does not sample from its policy.
        RuntimeError: When training begins, for weights that are spread over ranks (ZeRO-3, FSDP).

    Example:

    ```python
    trainer.add_callback(UpdateOverlap(trainer, every_steps=10))
    ```
    """

    def __init__(self, trainer: GRPOTrainer | RLOOTrainer, every_steps: int = 1):
        super().__init__(trainer, every_steps)
        self._before: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if weights_are_sharded(self.trainer.accelerator):
            raise RuntimeError(
                "The policy's weights are spread over ranks, so UpdateOverlap can't keep copies of them. Train with "
                "ZeRO-2 or DDP, or on one device."
            )
        if has_images(self.trainer.train_dataset):
            raise ValueError(
                "UpdateOverlap reads sequences without their images, so it is not available for prompts with images. "
                "Leave out the callback (in the recipes, overlap_every=0)."
            )
        self.begin_recording(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if self.is_measured(state.global_step + 1):
            self._before = self.copy_weights()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if not self._before:
            return
        update = {name: param.detach() - self._before[name] for name, param in self.trainable()}
        sums = torch.zeros(5, dtype=torch.float64)
        with self.weights(self._before):
            for i, inputs in enumerate(self.microbatches):
                for gradients in self._sequence_gradients(inputs):
                    whole, by_tensor = squared_cosines(update, gradients)
                    last = float(i == len(self.microbatches) - 1)
                    sums += torch.tensor([whole, by_tensor, last * by_tensor, 1.0, last], dtype=torch.float64)
        self.microbatches, self._before = [], {}
        sums = self.trainer.accelerator.reduce(sums.float().to(self.trainer.accelerator.device), "sum").tolist()
        metrics = self.trainer._metrics["train"]
        for name, total, count in (
            ("overlap", sums[0], sums[3]),
            ("tensor_overlap", sums[1], sums[3]),
            ("last_tensor_overlap", sums[2], sums[4]),
        ):
            if count:
                metrics[f"update/{name}"].append(total / count)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.end_recording()
        self._before = {}

    def _sequence_gradients(self, inputs: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """Of one sequence after another that has tokens, the gradient of its log-probability."""
        trainer, params = self.trainer, dict(self.trainable())
        ids, mask, counted = self.sequences(inputs)
        length = counted.size(1)
        with self.as_it_generates():
            for i in range(len(ids)):
                if not counted[i].any():
                    continue
                with trainer.accelerator.autocast():
                    logits = trainer.model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits
                log_probs = (logits[0, -length - 1 : -1].float() / trainer.temperature).log_softmax(-1)
                chosen = log_probs.gather(-1, ids[i, -length:].unsqueeze(-1)).squeeze(-1)
                gradients = torch.autograd.grad(chosen[counted[i]].sum(), list(params.values()), allow_unused=True)
                yield {name: g for name, g in zip(params, gradients, strict=True) if g is not None}


def squared_cosines(update: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """
    The squared cosine between an update and a gradient: of all tensors as one vector, and the mean over tensors.

    Args:
        update (`Mapping[str, torch.Tensor]`): By parameter; those without a gradient count in its length.
        gradients (`Mapping[str, torch.Tensor]`): Tensors whose update or gradient is zero count as orthogonal.
    """
    products = torch.stack([(update[n].double() * g.double()).sum() for n, g in gradients.items()])
    gradients_sq = torch.stack([g.double().square().sum() for g in gradients.values()])
    updates_sq = torch.stack([update[n].double().square().sum() for n in gradients])
    total_sq = sum(u.double().square().sum() for u in update.values())
    lengths = gradients_sq * updates_sq
    by_tensor = torch.where(lengths > 0, products.square() / torch.where(lengths > 0, lengths, 1), 0).mean()
    whole_lengths = gradients_sq.sum() * total_sq
    whole = products.sum().square() / whole_lengths if whole_lengths > 0 else torch.zeros(())
    return whole.item(), by_tensor.item()
