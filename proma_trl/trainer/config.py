"""`PROMAConfig`: GRPO's settings with those of the projection, without those that PROMA has no use for."""

import math
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from ..rules import PROMA, Chain, UpdateRule
from ..rules.isopo import ISOPO
from ..validation import check_choice, check_real, check_whole

# What makes a run REINFORCE, which needs no sequence gradients
REINFORCE_SETTINGS = '`projection="none"` and `isopo="none"`'

# Settings of the projection that ISOPO uses, too
_ALSO_ISOPO = ("projection_memory_budget", "projection_scope", "projection_accumulator_dtype")

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")

_NO_REFERENCE = "PROMA has no reference policy: its updates stay close to the policy by projection"
_NO_CLIPPING = "PROMA does not clip importance ratios, so the value would be ignored"
_OTHER_LOSS = "it belongs to a loss type that PROMA does not have"
_NO_BONUS = "an entropy bonus is not a multiple of the sequences' log-probability gradients, so it can't be projected"

# Settings of GRPO that PROMA does not use or cannot honour, and why. They must keep GRPO's default.
_UNUSED = {
    "beta": _NO_REFERENCE,
    "sync_ref_model": _NO_REFERENCE,
    "epsilon": _NO_CLIPPING,
    "epsilon_high": _NO_CLIPPING,
    "delta": _NO_CLIPPING,
    "sapo_temperature_neg": _OTHER_LOSS,
    "sapo_temperature_pos": _OTHER_LOSS,
    "vespo_k_pos": _OTHER_LOSS,
    "vespo_lambda_pos": _OTHER_LOSS,
    "vespo_k_neg": _OTHER_LOSS,
    "vespo_lambda_neg": _OTHER_LOSS,
    "entropy_coef": _NO_BONUS,
    "use_adaptive_entropy": _NO_BONUS,
    "torch_compile": "compiled layers bypass the hooks that collect sequence gradients",
}

# Optimizers that step inside the backward pass, where nothing accumulates
_FUSED_OPTIMIZERS = ("lomo", "adalomo")


@dataclass
class PROMAConfig(GRPOConfig):
    r"""
    Configuration class for the [`PROMATrainer`].

    It has all of [`~trl.GRPOConfig`]'s parameters, and those of the projection. Parameters of GRPO that PROMA has no
    use for (KL penalty, clipping, entropy bonus) must keep their defaults.

    Parameters:
        gradient_accumulation_steps (`int`, *optional*, defaults to `16`):
            Number of microbatches in an optimizer step. The projection acts between them, so that with `1` (GRPO's
            default) there is nothing to project, and training is REINFORCE.
        projection (`str`, *optional*, defaults to `"iterative"`):
            How the accumulated gradient is projected off a microbatch's sequence gradients. `"iterative"`: sweeps of
            one-sequence projections, as in the paper's experiments. `"exact"`: the orthogonal projection onto their
            span. `"none"`: no projection, which is REINFORCE.
        projection_sweeps (`int`, *optional*, defaults to `2`):
            Number of sweeps of `projection="iterative"`.
        projection_bound (`float` or `None`, *optional*, defaults to `0.5`):
            Largest norm of what is removed, as a multiple of the norm of the microbatch's policy gradient. `None`
            (on a command line: `inf`) for no bound.
        projection_strength (`float`, *optional*, defaults to `1.0`):
            Part of the projection that is removed, from 0 (REINFORCE) to 1 (PROMA).
        projection_memory_budget (`float`, *optional*, defaults to `0.5`):
            GiB that the sequence gradients of one parameter tensor may take. Larger ones, like those of a vocabulary,
            are worked on in parts, which costs time.
        projection_scope (`str`, *optional*, defaults to `"local"`):
            What is projected on several devices. `"local"`: each rank's accumulated gradient off its own sequences,
            which costs no communication. `"global"`: the gradient of all ranks off the sequences of all ranks, as if
            one rank held them in one microbatch; see the documentation for the communication it adds.
        projection_accumulator_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"` or `"bfloat16"`: what each rank keeps its own accumulated gradient in under ZeRO-2 and ZeRO-3
            with a local scope, where DeepSpeed keeps only a shard of the average over ranks.
        isopo (`str`, *optional*, defaults to `"none"`):
            Transforms the advantages tensor by tensor before the projection, as in
            [ISOPO](https://huggingface.co/papers/2512.23353). `"natural"`: an approximate natural gradient, by the
            regularized inverse of the sequences' Gram matrix. `"norm"`: sequences with a long gradient are shrunk.
            `"fisher"`: the same with lengths in the Fisher metric. With `projection="none"`, this is ISOPO alone.
        isopo_regularization (`float`, *optional*, defaults to `1.0`):
            Regularization of `isopo`, as a multiple of the running mean of squared gradient lengths. The larger, the
            closer to no transformation.
    """

    gradient_accumulation_steps: int = field(
        default=16,
        metadata={
            "help": "Number of microbatches in an optimizer step. The projection acts between them, so that with 1 "
            "(GRPO's default) there is nothing to project, and training is REINFORCE."
        },
    )
    projection: str = field(
        default="iterative",
        metadata={
            "help": "How the accumulated gradient is projected off a microbatch's sequence gradients. `'iterative'`: "
            "sweeps of one-sequence projections, as in the paper's experiments. `'exact'`: the orthogonal projection "
            "onto their span. `'none'`: no projection, which is REINFORCE.",
            "choices": ["iterative", "exact", "none"],
        },
    )
    projection_sweeps: int = field(
        default=2,
        metadata={"help": "Number of sweeps of `projection='iterative'`."},
    )
    projection_bound: float | None = field(
        default=0.5,
        metadata={
            "help": "Largest norm of what is removed, as a multiple of the norm of the microbatch's policy gradient. "
            "`None` (on a command line: `inf`) for no bound."
        },
    )
    projection_strength: float = field(
        default=1.0,
        metadata={"help": "Part of the projection that is removed, from 0 (REINFORCE) to 1 (PROMA)."},
    )
    projection_memory_budget: float = field(
        default=0.5,
        metadata={
            "help": "GiB that the sequence gradients of one parameter tensor may take. Larger ones, like those of a "
            "vocabulary, are worked on in parts, which costs time."
        },
    )
    projection_scope: str = field(
        default="local",
        metadata={
            "help": "What is projected on several devices. `'local'`: each rank's accumulated gradient off its own "
            "sequences, which costs no communication. `'global'`: the gradient of all ranks off the sequences of all "
            "ranks, as if one rank held them in one microbatch.",
            "choices": ["local", "global"],
        },
    )
    projection_accumulator_dtype: str = field(
        default="float32",
        metadata={
            "help": "What each rank keeps its own accumulated gradient in under ZeRO-2 and ZeRO-3 with a local scope, "
            "where DeepSpeed keeps only a shard of the average over ranks.",
            "choices": ["float32", "bfloat16"],
        },
    )
    isopo: str = field(
        default="none",
        metadata={
            "help": "Transforms the advantages tensor by tensor before the projection. `'natural'`: an approximate "
            "natural gradient. `'norm'`: sequences with a long gradient are shrunk. `'fisher'`: the same with lengths "
            "in the Fisher metric. With `projection='none'`, this is ISOPO alone.",
            "choices": ["none", "natural", "norm", "fisher"],
        },
    )
    isopo_regularization: float = field(
        default=1.0,
        metadata={
            "help": "Regularization of `isopo`, as a multiple of the running mean of squared gradient lengths. The "
            "larger, the closer to no transformation."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.projection_bound, float) and self.projection_bound == math.inf:
            self.projection_bound = None
        self._check_projection()
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
            setattr(self, name, check_whole(name, getattr(self, name)))
        super().__post_init__()
        self._refuse_unused()

    def _check_projection(self) -> None:
        for name in ("projection", "projection_scope", "projection_accumulator_dtype", "isopo"):
            check_choice(name, getattr(self, name), self.__dataclass_fields__[name].metadata["choices"])
        self.projection_sweeps = check_whole(
            "projection_sweeps", self.projection_sweeps, 'To remove nothing, set `projection="none"`.'
        )
        if self.projection_bound is not None:
            self.projection_bound = check_real(
                "projection_bound",
                self.projection_bound,
                "a finite number of at least 0",
                way_out="For an unbounded projection, set `projection_bound=None` (on a command line, `inf`).",
            )
        self.projection_strength = check_real(
            "projection_strength", self.projection_strength, "a number between 0 and 1", high=1.0
        )
        self.projection_memory_budget = check_real(
            "projection_memory_budget",
            self.projection_memory_budget,
            "a positive, finite number of GiB",
            low=sys.float_info.min,
        )
        self.isopo_regularization = check_real(
            "isopo_regularization",
            self.isopo_regularization,
            "a positive, finite number",
            low=sys.float_info.min,
            way_out='To transform nothing, set `isopo="none"`.',
        )

    def update_rule(self) -> UpdateRule:
        """The update rule that these settings describe."""
        projection = self.projection_settings()
        if self.isopo == "none":
            return projection
        isopo = ISOPO(self.isopo, self.isopo_regularization)
        return Chain(isopo, projection) if projection.removes else isopo

    def projection_settings(self) -> PROMA:
        """The projection that these settings describe."""
        return PROMA(
            method=self.projection,
            sweeps=self.projection_sweeps,
            bound=self.projection_bound,
            strength=self.projection_strength,
        )

    def rule_settings(self) -> list[str]:
        """Names of the settings that make a run what it is, for its model card."""
        shown = [name for name in vars(self) if self.isopo != "none" and name.startswith("isopo")]
        if self.projection == "none":
            return ["projection", *shown]
        if self._projects():
            return [*(name for name in vars(self) if name.startswith("projection")), *shown]
        return shown

    def settings_without_effect(self) -> list[str]:
        """Returns a sentence for each setting that was set and has no effect beside the others."""
        messages = []
        changed, projection = self.changed_settings(), self.projection_settings()
        others = [name for name in changed if name.startswith("projection")]
        if not projection.removes:
            off = next(n for n in ("projection", "projection_strength", "projection_bound") if not self._acts(n))
            what = "removes nothing" if self.isopo != "none" else "removes nothing, which is REINFORCE"
            used = _ALSO_ISOPO if self.isopo != "none" else ()
            messages += [
                f"`{name}={getattr(self, name)!r}` has no effect: `{off}={getattr(self, off)!r}` {what}."
                for name in others
                if name not in ("projection", off, *used)
            ]
        elif not self._projects():
            messages.append(
                f"`projection={self.projection!r}` has no effect with `gradient_accumulation_steps=1`: PROMA projects "
                "what earlier microbatches of an optimizer step have accumulated, and there are none, so that this "
                f"run is {self.update_rule().without_accumulated().name}. Set `gradient_accumulation_steps` to 4 or "
                "more (the default is 16), with a smaller `per_device_train_batch_size` if the batch is to stay the "
                "same."
            )
        if projection.removes and self.projection != "iterative" and "projection_sweeps" in changed:
            messages.append(
                f"`projection_sweeps={self.projection_sweeps}` has no effect with `projection={self.projection!r}`: "
                'only `projection="iterative"` makes sweeps.'
            )
        if self.isopo == "none" and "isopo_regularization" in changed:
            messages.append(
                f'`isopo_regularization={self.isopo_regularization}` has no effect with `isopo="none"`, which '
                "transforms nothing."
            )
        return messages

    def changed_settings(self) -> list[str]:
        """Names of the update rule's settings that differ from their defaults."""
        fields = self.__dataclass_fields__
        return [
            n for n, f in fields.items() if n.startswith(("projection", "isopo")) and getattr(self, n) != f.default
        ]

    def _acts(self, name: str) -> bool:
        return getattr(self, name) not in ("none", 0)

    def _projects(self) -> bool:
        return self.projection_settings().removes and self.gradient_accumulation_steps > 1

    def _refuse_unused(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is not available with PROMA, whose loss is REINFORCE. Choose how it "
                f"is normalized: {', '.join(map(repr, LOSS_TYPES))}."
            )
        defaults: dict[str, Any] = {f.name: f.default for f in fields(GRPOConfig)}
        for name, reason in _UNUSED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not available with PROMA: {reason}. Leave it at its "
                    f"default, {defaults[name]!r}, or use `GRPOTrainer`."
                )
        if self.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef={self.router_aux_loss_coef}` is not available with PROMA: the load-balancing "
                "loss of a Mixture-of-Experts model is not a multiple of the sequences' log-probability gradients, so "
                "it can't be projected. Set `router_aux_loss_coef=0.0`, or use `GRPOTrainer`."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer in _FUSED_OPTIMIZERS or optimizer.endswith("_layerwise"):
            raise ValueError(
                f"`optim={optimizer!r}` is not available with PROMA: it consumes gradients within the backward pass, "
                "where PROMA accumulates them. Choose another optimizer, such as `optim='adamw_torch'`."
            )
