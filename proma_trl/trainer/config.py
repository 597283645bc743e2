"""`PROMAConfig`: GRPO's settings with those of the projection, without those that PROMA has no use for."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import GenerationConfig
from trl import GRPOConfig

from ..intra import IntraPROMA
from ..intra.intra_proma import check_intra
from ..rules import PROMA, Chain, UpdateRule
from ..rules.isopo import ISOPO
from ..trust_region import TrustRegion
from ..trust_region.trust_region import check_trust_region
from ..validation import check_choice, check_real, check_whole
from .grpo_fields import KNOWN, LOSS_TYPES, REFUSED, default_of
from .precision import choose_precision
from .sampler_log_probs import VLLM_MAX_TOP_K
from .trl_internals import CHECKPOINTING

# What makes a run REINFORCE, whose backward pass is an ordinary one
REINFORCE_SETTINGS = '`projection="none"`, `isopo="none"` and `intra_dim=0`'

# Settings of DPPO beside `divergence`, and those of TRL's correction for the sampler, which DPPO's ratio is already
_TRUST_REGION = (
    "divergence_threshold",
    "divergence_threshold_high",
    "divergence_top_k",
    "divergence_mask",
    "ratio_cap",
)
_CORRECTION = tuple(f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max", "cap"))
# What makes the distribution that is sampled from another one than the policy at its temperature, if its value is not
# among these: fields, and what else `generation_kwargs` can hold, for transformers' `generate` and for vLLM
_TRUNCATION = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
_OF_TRANSFORMERS = {
    "do_sample": (True,),
    **dict.fromkeys(("typical_p", "guidance_scale"), (1.0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("top_h", "exponential_decay_length_penalty", "watermarking_config"), (None,)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), (None,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None, [], {})),
}
_OF_VLLM = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0.0,)),
    "min_tokens": (0,),
    **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words", "logits_processors"), (None, [], {})),
    **dict.fromkeys(("structured_outputs", "guided_decoding", "thinking_token_budget"), (None,)),
}

# Settings of the projection that other methods use, too
_ALSO_ISOPO = ("projection_memory_budget", "projection_scope", "projection_accumulator_dtype")
_ALSO_INTRA = ("projection_memory_budget",)
_ALSO_INTRA_ACCUMULATED = (*_ALSO_INTRA, "projection_accumulator_dtype")

# What the fields of the methods begin with
_METHODS = ("projection", "isopo", "intra")

# Optimizers that step inside the backward pass, where nothing accumulates
_FUSED_OPTIMIZERS = ("lomo", "adalomo")


@dataclass
class PROMAConfig(GRPOConfig):
    r"""
    Configuration class for the [`PROMATrainer`].

    It has all of [`~trl.GRPOConfig`]'s parameters, and those of the projection. Parameters of GRPO that PROMA has no
    use for (KL penalty, clipping, entropy bonus) must keep their defaults.

    Without `bf16`, training on a CPU is in float32; on a GPU it is in bfloat16, as in TRL.

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
        projection_memory_budget (`float` or `None`, *optional*):
            GiB that the sequence gradients of one parameter tensor may take. Larger ones, like those of a vocabulary,
            are worked on in parts, which costs time. `None` is an eighth of a GPU's memory, and 0.5 elsewhere.
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
        intra_dim (`int`, *optional*, defaults to `0`):
            Intra-PROMA, the paper's second variant: each microbatch's gradient of a linear layer's weight is projected
            off the outer product of two subspaces of this dimension, which dominate the layer's inputs and the
            gradients at its outputs. `0` for none; the paper's best runs have 10. With `projection="none"`, this is
            Intra-PROMA alone, which needs no sequence gradients and works with every architecture; with another
            `projection`, both variants act.
        intra_power_iterations (`int`, *optional*, defaults to `1`):
            Number of power iterations by which these subspaces are found.
        intra_strength (`float`, *optional*, defaults to `1.0`):
            Part of the gradient within the subspaces that is removed, from 0 (nothing) to 1.
        intra_target (`str`, *optional*, defaults to `"microbatch"`):
            Which gradient is projected. `"microbatch"`: the microbatch's own. `"accumulated"`: what the optimizer
            step's earlier microbatches have accumulated.
        intra_head (`bool`, *optional*, defaults to `True`):
            Whether the weight of the LM head is among the projected ones.
        divergence (`str`, *optional*):
            [DPPO](https://huggingface.co/papers/2602.04879): tokens whose probability an update would move further out
            of a trust region are masked, before any projection. What it is measured by, between the policy that
            sampled and the current one: `"binary_tv"` or `"binary_kl"` (total variation or KL divergence between "the
            sampled token" and "another"), `"topk_tv"` or `"topk_kl"` (between the sampler's K most probable tokens,
            the sampled one and the rest). With `projection="none"`, this is DPPO alone. `None`: no trust region. With
            one, importance ratios are those to the sampler, and `vllm_importance_sampling_correction` is switched off,
            as it would correct for the same again.
        divergence_threshold (`float`, *optional*):
            Largest divergence in the trust region. `None`: 0.15 for total variation, 0.05 for KL divergence.
        divergence_threshold_high (`float`, *optional*):
            The same for tokens that have become more probable. `None`: `divergence_threshold`.
        divergence_top_k (`int`, *optional*, defaults to `20`):
            K of `"topk_tv"` and `"topk_kl"`. vLLM gives no more than 20.
        divergence_mask (`str`, *optional*, defaults to `"directional"`):
            `"directional"`: tokens outside are masked where the advantage would move them further away. `"symmetric"`:
            whatever the sign of the advantage.
        ratio_cap (`float`, *optional*):
            Largest importance ratio with a trust region; a capped token keeps its gradient. `None`: no cap.
        order_by_length (`bool`, *optional*):
            Whether sequences of similar length of an optimizer step share a microbatch, which saves padding. With one
            process, all microbatches of a step then take about equally many token positions: many short sequences or
            few long ones, `per_device_train_batch_size` on average; with several, all hold as many sequences. They
            come in a random order, a function of `seed`. TRL's
            microbatches stay with `per_device_train_batch_size=1`, and where the loss depends on which sequences share
            a microbatch: with `loss_type="bnpo"`, and with `top_entropy_quantile`. `None`: `True` for REINFORCE and
            DPPO alone, whose gradient is a sum over sequences and does not depend on it; `False` for other methods.
        max_tokens_per_microbatch (`int`, *optional*):
            Largest number of token positions that a microbatch should take, padding included. Since their number is
            `gradient_accumulation_steps`, it can be exceeded: a warning then says so.
        adapter_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            What the adapters of a model that is quantized to 4 or 8 bits are trained in (QLoRA). `"bfloat16"`, as in
            TRL; or `"float32"`, in which no small update is lost to rounding.
    """

    # What messages call the method
    _method: ClassVar[str] = "PROMA"

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
    projection_memory_budget: float | None = field(
        default=None,
        metadata={
            "help": "GiB that the sequence gradients of one parameter tensor may take. Larger ones, like those of a "
            "vocabulary, are worked on in parts, which costs time. `None` is an eighth of a GPU's memory, and 0.5 "
            "elsewhere."
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
    intra_dim: int = field(
        default=0,
        metadata={
            "help": "Intra-PROMA: dimension of the subspaces, of a linear layer's inputs and of the gradients at its "
            "outputs, that each microbatch's gradient is projected off. `0` for none; the paper's best runs have 10. "
            "With `projection='none'`, this is Intra-PROMA alone, with another projection both variants act."
        },
    )
    intra_power_iterations: int = field(
        default=1,
        metadata={"help": "Number of power iterations by which the subspaces of `intra_dim` are found."},
    )
    intra_strength: float = field(
        default=1.0,
        metadata={"help": "Part of the gradient within the subspaces that is removed, from 0 (nothing) to 1."},
    )
    intra_target: str = field(
        default="microbatch",
        metadata={
            "help": "Which gradient Intra-PROMA projects: `'microbatch'`, the microbatch's own, or `'accumulated'`, "
            "what the optimizer step's earlier microbatches have accumulated.",
            "choices": ["microbatch", "accumulated"],
        },
    )
    intra_head: bool = field(
        default=True,
        metadata={"help": "Whether Intra-PROMA projects the gradient of the LM head's weight."},
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "DPPO: what the trust region is measured by, between the policy that sampled and the current one. "
            "`'binary_tv'`, `'binary_kl'`: total variation or KL divergence between the sampled token and all others. "
            "`'topk_tv'`, `'topk_kl'`: between the sampler's K most probable tokens, the sampled one and the rest. "
            "`None`: no trust region. With `projection='none'`, this is DPPO alone.",
            "choices": ["binary_tv", "binary_kl", "topk_tv", "topk_kl"],
        },
    )
    divergence_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Largest divergence in the trust region. `None`: 0.15 for total variation, 0.05 for KL divergence."
        },
    )
    divergence_threshold_high: float | None = field(
        default=None,
        metadata={
            "help": "The same for tokens that have become more probable. `None`: `divergence_threshold`.",
        },
    )
    divergence_top_k: int = field(
        default=20,
        metadata={"help": "K of `'topk_tv'` and `'topk_kl'`. vLLM gives no more than 20."},
    )
    divergence_mask: str = field(
        default="directional",
        metadata={
            "help": "`'directional'`: tokens outside the trust region are masked where the advantage would move them "
            "further away. `'symmetric'`: whatever the sign of the advantage.",
            "choices": ["directional", "symmetric"],
        },
    )
    ratio_cap: float | None = field(
        default=None,
        metadata={
            "help": "Largest importance ratio with a trust region; a capped token keeps its gradient. `None`: no cap."
        },
    )
    order_by_length: bool | None = field(
        default=None,
        metadata={
            "help": "Whether sequences of similar length of an optimizer step share a microbatch, which saves "
            "padding. The number of sequences in a microbatch then varies around `per_device_train_batch_size`. "
            "`None`: with REINFORCE and DPPO alone, whose gradient does not depend on it."
        },
    )
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": "Number of token positions, padding included, from which on a microbatch is warned of. With "
            "`order_by_length`, those of a step hold about equally many."
        },
    )
    adapter_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "What the adapters of a quantized model are trained in: `'bfloat16'`, as in TRL, or `'float32'`.",
            "choices": ["bfloat16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.projection_bound, float) and self.projection_bound == math.inf:
            self.projection_bound = None
        problems = [*self._grpo_problems(), *self._projection_problems()]
        try:
            self._check_trust_region()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        if getattr(self, CHECKPOINTING) is None:
            setattr(self, CHECKPOINTING, self.gradient_checkpointing)
        choose_precision(self)
        super().__post_init__()

    def _projection_problems(self) -> list[str]:
        """A sentence for each setting of the methods, and of the batch, that is not of the right kind or range."""
        problems = []

        def checked(name: str, check: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            try:
                setattr(self, name, check(name, getattr(self, name), *args, **kwargs))
            except ValueError as error:
                problems.append(str(error))

        for name in ("projection", "projection_scope", "projection_accumulator_dtype", "isopo", "adapter_dtype"):
            checked(name, check_choice, self.__dataclass_fields__[name].metadata["choices"])
        checked("projection_sweeps", check_whole, 'To remove nothing, set `projection="none"`.')
        if self.projection_bound is not None:
            checked(
                "projection_bound",
                check_real,
                "a finite number of at least 0",
                way_out="For an unbounded projection, set `projection_bound=None` (on a command line, `inf`).",
            )
        checked("projection_strength", check_real, "a number between 0 and 1", high=1.0)
        if self.projection_memory_budget is not None:
            checked(
                "projection_memory_budget",
                check_real,
                "a positive, finite number of GiB",
                low=sys.float_info.min,
                way_out="For the device's own default, leave it out, or set `projection_memory_budget=None`.",
            )
        checked(
            "isopo_regularization",
            check_real,
            "a positive, finite number",
            low=sys.float_info.min,
            way_out='To transform nothing, set `isopo="none"`.',
        )
        for name in ("intra_dim", "intra_power_iterations"):
            checked(name, check_whole, low=0)
        if not isinstance(self.order_by_length, bool | None):
            problems.append(f"`order_by_length` must be True, False or None, got {self.order_by_length!r}.")
        if self.max_tokens_per_microbatch is not None:
            checked("max_tokens_per_microbatch", check_whole)
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
            checked(name, check_whole)
        try:
            check_intra(
                self.intra_dim,
                self.intra_power_iterations,
                self.intra_strength,
                self.intra_target,
                self.intra_head,
                prefix="intra_",
            )
        except ValueError as error:
            known = any(problem.startswith("`intra_") for problem in problems)
            return problems if known else [*problems, str(error)]
        intra = self.intra_settings()
        self.intra_strength = float(intra.strength)
        if not problems and intra.removes and self.projection_scope == "global":
            if self._needs_sequences() or intra.target == "accumulated":
                other = '`intra_target="accumulated"`' if intra.target == "accumulated" else "another method"
                problems.append(
                    f"`intra_dim={self.intra_dim}` together with {other} is not available with `projection_scope="
                    '"global"`: Intra-PROMA projects each rank\'s gradient by itself. Set `projection_scope="local"`, '
                    "or `intra_dim=0`."
                )
        return problems

    def _check_trust_region(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        names = [name for name in (*_TRUST_REGION, *_CORRECTION) if name in defaults]
        changed = [name for name in names if getattr(self, name) != defaults[name]]
        if self.divergence is None:
            for name in changed:
                if name in _TRUST_REGION:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` has no effect without a trust region. Set `divergence`, "
                        'such as `divergence="binary_tv"`, or leave it out.'
                    )
            return
        check_trust_region(
            self.divergence,
            self.divergence_threshold,
            self.divergence_threshold_high,
            self.divergence_top_k,
            self.divergence_mask,
            self.ratio_cap,
            prefix="divergence_",
        )
        region = self.trust_region()
        for name in changed:
            if name in _CORRECTION:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is not available with `divergence={self.divergence!r}`, whose "
                    "importance ratios are those to the sampler already. Leave it out; `ratio_cap` bounds the ratios."
                )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"`importance_sampling_level={self.importance_sampling_level!r}` is not available with "
                f"`divergence={self.divergence!r}`, which weighs tokens. Leave it at `'token'`."
            )
        if self.use_vllm and "logprobs" in (self.generation_kwargs or {}):
            raise ValueError(
                "`generation_kwargs` sets `logprobs`, which `divergence` sets itself: see `divergence_top_k`. Leave "
                "it out."
            )
        if region.needs_top and self.use_vllm and self.divergence_top_k > VLLM_MAX_TOP_K:
            raise ValueError(
                f"`divergence_top_k={self.divergence_top_k}` is more than vLLM gives, which is the log-probabilities "
                f"of {VLLM_MAX_TOP_K} tokens at a position. Set it to {VLLM_MAX_TOP_K} or less."
            )
        # The latter is a former name, which TRL still takes
        for name in ("use_transformers_continuous_batching", "use_transformers_paged"):
            if region.needs_top and getattr(self, name, False):
                raise ValueError(
                    f"`divergence={self.divergence!r}` is not available with `{name}=True`, which gives the "
                    "log-probabilities of sampled tokens alone. Set `divergence` to `'binary_tv'` or `'binary_kl'`, "
                    "or sample with vLLM or `generate`."
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

    def intra_settings(self) -> IntraPROMA:
        """The settings of Intra-PROMA."""
        return IntraPROMA(
            dim=self.intra_dim,
            power_iterations=self.intra_power_iterations,
            strength=self.intra_strength,
            target=self.intra_target,
            head=self.intra_head,
        )

    def trust_region(self) -> TrustRegion | None:
        """The trust region that these settings describe."""
        if self.divergence is None:
            return None
        return TrustRegion(
            divergence=self.divergence,
            threshold=self.divergence_threshold,
            threshold_high=self.divergence_threshold_high,
            top_k=self.divergence_top_k,
            mask=self.divergence_mask,
            ratio_cap=self.ratio_cap,
        )

    def acting_methods(self) -> list[UpdateRule | IntraPROMA | TrustRegion]:
        """What makes this run another than REINFORCE, for its name and what it cites. If nothing does, REINFORCE."""
        rule = self.update_rule()
        # With one microbatch a step, nothing has been accumulated before it
        rule = rule.without_accumulated() if self.gradient_accumulation_steps == 1 else rule
        intra = [self.intra_settings()] if self._intra_acts() else []
        region = [] if self.divergence is None else [self.trust_region()]
        return [*intra, *region] if (intra or region) and rule.is_plain else [*intra, rule, *region]

    def method_name(self) -> str:
        """What this run's method is called."""
        return " and ".join(method.name for method in self.acting_methods())

    def method_summary(self) -> str:
        """What this run's method is called, each part with its settings."""
        parts = {
            "Intra-PROMA": [
                f"dimension {self.intra_dim}",
                counted(self.intra_power_iterations, "power iteration"),
                *_unless(1, "strength", self.intra_strength),
                *_unless("microbatch", "target", self.intra_target),
                *([] if self.intra_head else ["without head"]),
            ],
            "ISOPO": [self.isopo, f"regularization {self.isopo_regularization:g}"],
            "PROMA": [
                self.projection,
                *([counted(self.projection_sweeps, "sweep")] if self.projection == "iterative" else []),
                "no bound" if self.projection_bound is None else f"bound {self.projection_bound:g}",
                *_unless(1, "strength", self.projection_strength),
                *_unless("local", "scope", self.projection_scope),
            ],
        }
        region = self.trust_region()
        if region is not None:
            low, high = region.thresholds
            parts["DPPO"] = [
                self.divergence,
                *([f"top {self.divergence_top_k}"] if region.needs_top else []),
                f"threshold {low:g}",
                *_unless(low, "threshold high", high),
                *_unless("directional", "mask", self.divergence_mask),
                *_unless(None, "ratio cap", self.ratio_cap),
            ]
        names = self.method_name().split(" and ")
        return " and ".join(f"{name} ({', '.join(parts[name])})" if name in parts else name for name in names)

    def rule_settings(self) -> list[str]:
        """Names of the settings that make a run what it is, for its model card."""
        acting = [prefix for prefix, acts in (("isopo", self.isopo != "none"), ("intra", self._intra_acts())) if acts]
        shown = [name for name in vars(self) if name.startswith(tuple(acting))]
        shown += [] if self.divergence is None else ["divergence", *_TRUST_REGION]
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
        intra = self.intra_settings()
        if not projection.removes:
            off = next(n for n in ("projection", "projection_strength", "projection_bound") if not self._acts(n))
            alone = self.isopo == "none" and not intra.removes and self.divergence is None
            what = "removes nothing, which is REINFORCE" if alone else "removes nothing"
            used = _ALSO_ISOPO if self.isopo != "none" else ()
            if intra.removes:
                used += _ALSO_INTRA_ACCUMULATED if intra.target == "accumulated" else _ALSO_INTRA
            messages += [
                f"`{name}={getattr(self, name)!r}` has no effect: `{off}={getattr(self, off)!r}` {what}."
                for name in others
                if name not in ("projection", off, *used)
            ]
        elif not self._projects():
            messages.append(
                f"`projection={self.projection!r}` has no effect with `gradient_accumulation_steps=1`: PROMA projects "
                "what earlier microbatches of an optimizer step have accumulated, and there are none, so that this "
                f"run is {self.method_name()}. Set `gradient_accumulation_steps` to 4 or more (the default is 16), "
                "with a smaller `per_device_train_batch_size` if the batch is to stay the same."
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
        if not intra.removes:
            off = "intra_dim" if self.intra_dim == 0 else "intra_strength"
            messages += [
                f"`{name}={getattr(self, name)!r}` has no effect with `{off}={getattr(self, off)}`: Intra-PROMA "
                "projects nothing."
                for name in changed
                if name.startswith("intra") and name != off
            ]
        elif not self._intra_acts():
            messages.append(
                '`intra_target="accumulated"` has no effect with `gradient_accumulation_steps=1`: nothing has been '
                "accumulated before the one microbatch. Set `gradient_accumulation_steps` to 4 or more, or "
                '`intra_target="microbatch"`.'
            )
        region = self.trust_region()
        if region is not None:
            messages += self._without_effect_on(region)
        return messages

    def _without_effect_on(self, region: TrustRegion) -> Iterator[str]:
        if not region.needs_top and self.divergence_top_k != self.__dataclass_fields__["divergence_top_k"].default:
            yield (
                f"`divergence_top_k={self.divergence_top_k}` has no effect with `divergence={self.divergence!r}`: "
                'only `"topk_tv"` and `"topk_kl"` take the most probable tokens.'
            )
        given = self.generation_kwargs or {}
        for name, neutral in {**_TRUNCATION, **(_OF_VLLM if self.use_vllm else _OF_TRANSFORMERS)}.items():
            # What `generation_kwargs` holds takes the place of the field
            value, where = (
                (given[name], " in `generation_kwargs`") if name in given else (getattr(self, name, None), "")
            )
            if value is not None and value not in neutral:
                yield (
                    f"With `{name}={value!r}`{where}, completions are {self._sampled_otherwise()} DPPO is meant for "
                    f"`{name}={neutral[0]!r}`."
                )
        if self.use_vllm and self.vllm_structured_outputs_regex is not None:
            yield f"With `vllm_structured_outputs_regex`, completions are {self._sampled_otherwise()} Leave it out."
        temperature = given.get("temperature")
        if temperature is not None and temperature != self.temperature:
            yield (
                f"With `temperature={temperature!r}` in `generation_kwargs`, completions are "
                f"{self._sampled_otherwise(f' at `temperature={self.temperature!r}`')} Set the field `temperature`, "
                "which the loss uses, too."
            )

    def sampling_left_to_model(self, passed: GenerationConfig, own: GenerationConfig) -> Iterator[str]:
        """
        Yields a sentence for each setting of a model's own that transformers' `generate` takes, as TRL leaves it open,
        and that `divergence` would measure.

        Args:
            passed (`GenerationConfig`): What TRL generates with.
            own (`GenerationConfig`): The model's.
        """
        for name, neutral in {**_TRUNCATION, **_OF_TRANSFORMERS}.items():
            value = getattr(own, name, None)
            if getattr(passed, name, None) is None and value is not None and value not in neutral:
                yield (
                    f"With `{name}={value!r}` in the model's `generation_config`, completions are "
                    f"{self._sampled_otherwise()} Set `model.generation_config.{name} = None`."
                )

    def _sampled_otherwise(self, at: str = "") -> str:
        return (
            f"sampled from another distribution than the policy's{at}, and `divergence={self.divergence!r}` measures "
            "that difference, too."
        )

    @property
    def depends_on_partition(self) -> bool:
        """Whether the loss depends on which sequences share a microbatch."""
        return self.loss_type == "bnpo" or self.top_entropy_quantile < 1.0

    @property
    def orders_by_length(self) -> bool:
        """Whether sequences of similar length share a microbatch."""
        wanted = self.order_by_length
        if wanted is None:
            wanted = self.update_rule().is_plain and not self.intra_settings().removes
        return wanted and self.per_device_train_batch_size > 1 and not self.depends_on_partition

    @property
    def varies_microbatches(self) -> bool:
        """
        Whether microbatches hold different numbers of sequences. On several ranks they don't: TRL gathers one number
        for each sequence of a microbatch.
        """
        return self.orders_by_length and self.world_size == 1

    @property
    def largest_microbatch(self) -> int:
        """Largest number of sequences that a microbatch can hold."""
        k, n = self.per_device_train_batch_size, self.gradient_accumulation_steps
        # All microbatches but one with a single sequence
        return (k - 1) * n + 1 if self.varies_microbatches else k

    def changed_settings(self) -> list[str]:
        """Names of the update rule's settings that differ from their defaults."""
        fields = self.__dataclass_fields__
        return [n for n, f in fields.items() if n.startswith(_METHODS) and getattr(self, n) != f.default]

    def _acts(self, name: str) -> bool:
        return getattr(self, name) not in ("none", 0)

    def _projects(self) -> bool:
        return self.projection_settings().removes and self.gradient_accumulation_steps > 1

    def _needs_sequences(self) -> bool:
        return self.isopo != "none" or self.projection_settings().removes

    def _intra_acts(self) -> bool:
        intra = self.intra_settings()
        return intra.removes and (intra.target == "microbatch" or self.gradient_accumulation_steps > 1)

    def _grpo_problems(self) -> Iterator[str]:
        """A sentence for each of GRPO's settings that can't be honoured."""
        if self.loss_type not in LOSS_TYPES:
            yield (
                f"`loss_type={self.loss_type!r}` is not available with {self._method}, whose loss is "
                "REINFORCE. Choose how it "
                f"is normalized: {', '.join(map(repr, LOSS_TYPES))}."
            )
        for grpo_field in fields(GRPOConfig):
            name, default = grpo_field.name, default_of(grpo_field)
            value = getattr(self, name)
            if value == default:
                continue
            if name in REFUSED:
                yield (
                    f"`{name}={value!r}` is not available with {self._method}: {REFUSED[name]}. Leave it at its "
                    f"default, {default!r}, or use `GRPOTrainer`."
                )
            # What it does to the loss or to gradients can't be told
            if name not in KNOWN and name not in PROMAConfig.__annotations__:
                yield (
                    f"`{name}={value!r}` is a setting of the installed TRL or transformers that this version of "
                    f"proma-trl does not know, so it can't say whether it works with {self._method}. Leave it at its "
                    f"default, {default!r}, and report it to proma-trl, or use `GRPOTrainer`."
                )
        if self.router_aux_loss_coef:
            yield (
                f"`router_aux_loss_coef={self.router_aux_loss_coef}` is not available with {self._method}: the "
                "load-balancing loss of a Mixture-of-Experts model is not a multiple of the sequences' "
                "log-probability gradients, so it can't be projected. Set `router_aux_loss_coef=0.0`, or use "
                "`GRPOTrainer`."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer in _FUSED_OPTIMIZERS or optimizer.endswith("_layerwise"):
            yield (
                f"`optim={optimizer!r}` is not available with {self._method}: it consumes gradients within the "
                "backward pass, where PROMA accumulates them. Choose another optimizer, such as `optim='adamw_torch'`."
            )


def counted(number: int, noun: str) -> str:
    """A number and what it counts, for messages."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _unless(default: float | str | None, name: str, value: float | str | None) -> list[str]:
    """A setting's name and value, if it is another than its default."""
    return [] if value == default else [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"]
