"""PROMA with the directions of random other sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from ..accumulation import ProjectedAccumulation
from ..rules import PROMA, InnerProducts, UpdateRule
from ..trainer import PROMATrainer
from ..trainer.step_microbatches import StepMicrobatches

_NAME = "PROMA with random directions"
_SETTINGS = (
    "`RandomDirectionsTrainer` is the control of PROMA's projection alone. Set `projection`, and leave `isopo` and "
    "`intra_dim` at their defaults."
)


class RandomDirections(UpdateRule):
    """
    PROMA's removal, along the directions of other sequences than those whose gradient is added.

    A microbatch holds 2k sequences: first k of its own, whose policy gradient is added, then k others, which what has
    been accumulated is projected off. The policy gradient of its own sequences bounds the removal, as in PROMA.

    Args:
        projection ([`PROMA`]): How it is projected.

    Raises:
        ValueError: If the projection removes nothing.
    """

    name = _NAME
    needs_accumulated = True
    needs_gram = False

    def __init__(self, projection: PROMA):
        if not projection.removes:
            raise ValueError("The projection removes nothing, so that its directions make no difference.")
        self.projection = projection
        self.inverts_gram = projection.inverts_gram

    def coefficients(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        """Advantages of other sequences do not count."""
        if products.overlaps is None:
            return self.policy(products, advantages)
        own, _ = advantages.expand_as(products.norms_sq).chunk(2, -1)
        return torch.cat([own, self.projection.coefficients(_others(products, own), torch.zeros_like(own))], -1)

    def policy(self, products: InnerProducts, advantages: torch.Tensor) -> torch.Tensor:
        own, _ = advantages.expand_as(products.norms_sq).chunk(2, -1)
        return torch.cat([own, torch.zeros_like(own)], -1)

    def observe(self, products: InnerProducts, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
        """What PROMA logs, with the other sequences in the place of the microbatch's own."""
        if products.overlaps is None:
            return {}
        own, _ = advantages.expand_as(products.norms_sq).chunk(2, -1)
        return self.projection.observe(_others(products, own), torch.zeros_like(own))


def _others(products: InnerProducts, advantages: torch.Tensor) -> InnerProducts:
    """The inner products of the other sequences, with the policy gradient of the microbatch's own, `(..., k)`."""
    k = advantages.shape[-1]
    policy_sq = products.policy_sq
    if policy_sq is None:
        policy_sq = replace(products, gram=products.gram[..., :k, :k]).length_sq(advantages)
    return replace(products, gram=products.gram[..., k:, k:], overlaps=products.overlaps[..., k:], policy_sq=policy_sq)


class RandomDirectionsTrainer(PROMATrainer):
    """
    [`PROMATrainer`] that projects off the directions of as many random sequences of the same rollout as a microbatch
    has, in the place of its own: those that take part in another optimizer step where there are any, and else those of
    other microbatches. If this does as well as PROMA, it does not matter whose probabilities PROMA holds.

    A microbatch takes a forward and a backward pass of twice as many sequences. Metrics of a microbatch (`entropy`)
    are means over all of them. Microbatches are TRL's: `order_by_length` has no effect.

    Raises:
        ValueError: For settings that project nothing or do more than project; if `loss_type` is not `"dapo"`, since
            other losses divide by a number that changes with the sequences in a microbatch; for a global scope; if a
            rollout has one microbatch; for images.

    Example:

    ```python
    from proma_trl import PROMAConfig
    from proma_trl.controls import RandomDirectionsTrainer

    trainer = RandomDirectionsTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, args=PROMAConfig(), train_dataset=data)
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "control", "proma-trl"]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._name, self._tag_names = _NAME, type(self)._tag_names
        self._card_evidence = ()
        settings = self.args
        self._microbatches = StepMicrobatches(self, orders=False)
        if self.accumulation is None:
            raise ValueError(_SETTINGS)
        if settings.loss_type != "dapo":
            raise ValueError(
                f"`loss_type={settings.loss_type!r}` divides by a number that changes with the sequences in a "
                'microbatch, to which `RandomDirectionsTrainer` adds others. Set `loss_type="dapo"`.'
            )
        if settings.steps_per_generation == 1:
            raise ValueError(
                "`steps_per_generation=1` makes one microbatch of a rollout, so that there are no other sequences. "
                "Set it to a multiple of `gradient_accumulation_steps`."
            )

    def _new_accumulation(self, rule: UpdateRule, microbatch_size: int) -> ProjectedAccumulation:
        if not isinstance(rule, PROMA) or not rule.removes or self.args.intra_settings().removes:
            raise ValueError(_SETTINGS)
        if self.args.projection_scope == "global" and self.accelerator.num_processes > 1:
            raise ValueError(
                '`projection_scope="global"` is not available with `RandomDirectionsTrainer`, which draws sequences '
                'of its own rank. Set `projection_scope="local"`.'
            )
        return super()._new_accumulation(RandomDirections(rule), 2 * microbatch_size)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return super()._compute_loss(model, self._with_others(inputs) if self.model.training else inputs)

    def _with_others(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A microbatch with as many random sequences behind its own, whose advantages are zero."""
        k, rollout = len(inputs["advantages"]), self._buffered_inputs
        drawn = self._draw(k)
        together = dict(inputs)
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if len(value) != k:
                raise ValueError(
                    f"`RandomDirectionsTrainer` can't tell whose rows `{name}` holds: train on text alone."
                )
            together[name] = torch.cat([value, *(rollout[i][name][j : j + 1] for i, j in drawn)])
        together["advantages"] = torch.cat([inputs["advantages"], torch.zeros_like(inputs["advantages"])])
        return together

    def _draw(self, k: int) -> list[tuple[int, int]]:
        """Places of k sequences: their microbatch in the rollout, and their row in it. A function of seed and step."""
        here, size = self._step % self.args.steps_per_generation, self.args.gradient_accumulation_steps
        microbatches = range(self.args.steps_per_generation)
        others = [i for i in microbatches if i // size != here // size] or [i for i in microbatches if i != here]
        places = [(i, j) for i in others for j in range(len(self._buffered_inputs[i]["advantages"]))]
        generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + self._step)
        return [places[n] for n in torch.randperm(len(places), generator=generator)[:k].tolist()]
