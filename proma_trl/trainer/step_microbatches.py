"""The microbatches that a trainer takes in an optimizer step, laid out when the step begins."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ..rules import PROMA
from .grpo_fields import MEANS_OF_SEQUENCES
from .run_description import say
from .step_layout import Positions, StepLayout

if TYPE_CHECKING:
    from .proma_trainer import PROMATrainer

logger = logging.getLogger(__name__)


class StepMicrobatches:
    """
    Hands out the microbatches of a trainer's optimizer steps.

    TRL's own stay as they are in its buffer, which checkpoints hold: how they are laid out is a function of them, the
    seed and the step.

    Args:
        trainer ([`PROMATrainer`]): The trainer.
        orders (`bool`): Whether sequences of similar length share a microbatch.

    Attributes:
        token_share (`float`): The last microbatch's counted tokens, divided by the mean of its step's microbatches.
    """

    def __init__(self, trainer: PROMATrainer, orders: bool):
        args = trainer.args
        self.token_share = 1.0
        self._trainer = weakref.proxy(trainer)  # the trainer holds this
        self._layout = StepLayout(
            orders=orders,
            equal=not args.varies_microbatches,
            mean_of_sequences=args.loss_type in MEANS_OF_SEQUENCES,
            seed=args.seed,
        )
        self._laid_out: list[tuple[dict[str, Any], float]] = []
        # Microbatches of the step that have been handed out
        self._num_taken = 0
        self._has_said = False

    def forget(self) -> None:
        """Training begins anew: what is left of an interrupted step is not trained on."""
        self._laid_out, self._num_taken = [], 0

    def take(self) -> dict[str, Any]:
        """The next microbatch, as TRL's loss takes it."""
        trainer = self._trainer
        if not self._laid_out:
            first = trainer._step % trainer.args.steps_per_generation
            # A step can need more microbatches than a generation has left: then it is laid out in several parts
            stop = first + trainer.current_gradient_accumulation_steps - self._num_taken
            self._laid_out = self._lay_out(trainer._buffered_inputs[first:stop])
        self._num_taken = 0 if trainer.accelerator.sync_gradients else self._num_taken + 1
        inputs, self.token_share = self._laid_out.pop(0)
        return inputs

    def _lay_out(self, microbatches: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
        trainer = self._trainer
        skippable = [skips for inputs in microbatches for skips in self._skippable(inputs)]
        found, positions = self._layout.arrange(microbatches, trainer.state.global_step, skippable)
        self._log(positions)
        counted = torch.tensor([x.num_counted for x in found], dtype=torch.float32)
        if trainer.accelerator.num_processes > 1:
            counted = trainer.accelerator.reduce(counted.to(trainer.accelerator.device)).cpu()
        shares = counted / counted.mean().clamp(min=1e-9)
        return [(x.inputs, share) for x, share in zip(found, shares.tolist(), strict=True)]

    def _skippable(self, inputs: dict[str, Any]) -> list[bool]:
        """Which sequences of a microbatch have no gradient, and no part in what others are projected off."""
        accumulation, k = self._trainer.accumulation, len(inputs["completion_mask"])
        # On several ranks, microbatches hold equally many sequences
        if self._trainer.args.depends_on_partition or self._trainer.args.world_size > 1:
            return [False] * k
        unscored = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).eq(0).all(1)
        if accumulation is None:
            return (unscored | inputs["advantages"].reshape(k, -1).eq(0).all(1)).tolist()
        # PROMA protects the directions of sequences without an advantage. ISOPO's running means are taken over all
        # sequences, and Intra-PROMA's subspaces over all inputs
        is_proma = isinstance(accumulation.rule, PROMA) and accumulation.intra is None
        return unscored.tolist() if is_proma else [False] * k

    def _log(self, positions: Positions) -> None:
        trainer, args = self._trainer, self._trainer.args
        per_token = [n / positions.tokens for n in (positions.laid_out, positions.trimmed, positions.padded)]
        trainer._metrics["train"]["batch/positions_per_token"].append(per_token[0])
        trainer._metrics["train"]["batch/skipped_fraction"].append(positions.skipped / positions.sequences)
        limit = args.max_tokens_per_microbatch
        if limit is not None and positions.largest > limit:
            logger.warning(
                "A microbatch takes %d token positions, more than `max_tokens_per_microbatch=%d`: the optimizer step "
                "takes %d in %d microbatches. Raise `gradient_accumulation_steps`, and lower "
                "`per_device_train_batch_size`.",
                positions.largest,
                limit,
                positions.laid_out,
                trainer.current_gradient_accumulation_steps,
            )
        if not self._has_said and trainer.accelerator.is_main_process:
            self._has_said = True
            say(
                f"Padding: the model runs on {per_token[0]:.2f} positions for each real token. In TRL's microbatches "
                f"it would be {per_token[1]:.2f}, with the padding of the whole generation batch {per_token[2]:.2f}."
            )
            if args.order_by_length and args.depends_on_partition:
                setting = 'loss_type="bnpo"' if args.loss_type == "bnpo" else "top_entropy_quantile"
                say(
                    f"Microbatches stay as TRL divides them: with `{setting}` the loss depends on which sequences "
                    "share one."
                )
