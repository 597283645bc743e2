"""`PROMATrainer`: TRL's `GRPOTrainer` with REINFORCE as its loss and the projected accumulation beneath it."""

import functools
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..accumulation import ProjectedAccumulation
from ..accumulation.microbatch import Microbatch
from ..backends import whole_shape
from ..rules import PROMA, UpdateRule
from ..sequence_grads.probe import random_numbers_kept
from ..validation import check_trained, encoder_decoder_refusal
from .config import PROMAConfig
from .fused_head import sequence_head
from .model_card import EVIDENCE, ModelCardMixin
from .padding import PaddingTrimmer
from .reward_checks import check_trainer_rewards
from .run_description import SayWhatRuns
from .sampler_log_probs import check_log_probs, sampler_log_probs
from .sampling import check_server, check_server_log_probs
from .setup_checks import (
    RefuseNoSteps,
    check_prompts,
    check_ranks_agree,
    check_setup,
    is_quantized,
    settings_without_effect,
    too_few_prompts,
)
from .step_microbatches import StepMicrobatches
from .token_trust_region import ON_CPU, TokenTrustRegion
from .trl_internals import SCORING, check_trl, prepare_head, recorded, replaced

logger = logging.getLogger(__name__)


_RULE_FILE = "update_rule.pt"

# Where microbatches and optimizer steps end, how long completions are, and what ratios are taken to
_ROLLOUT_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "max_completion_length",
    "temperature",
    "use_vllm",
    "vllm_importance_sampling_correction",
)


class _LogAtStart(TrainerCallback):
    """Logs messages when a run begins, where its other messages are read."""

    def __init__(self, level: int, messages: list[str]):
        self.level, self.messages = level, messages

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        for message in self.messages:
            logger.log(self.level, message)


class PROMATrainer(ModelCardMixin, GRPOTrainer):
    """
    Trainer for PROMA, introduced in [PROMA: Projected Microbatch Accumulation for Reference-Free Proximal Policy
    Updates](https://huggingface.co/papers/2601.10498).

    It takes [`~trl.GRPOTrainer`]'s arguments, with a [`PROMAConfig`] as `args`. Where GRPO clips importance ratios,
    PROMA projects: the loss is REINFORCE with group-relative advantages (and the unclipped ratio where the minibatch
    is off-policy), and before the gradient of a microbatch is accumulated, the directions in which that microbatch's
    sequences change their probability fastest are removed from what has been accumulated in the step.

    With `intra_dim`, each microbatch's own gradient is projected, too, or alone: this is the paper's second variant,
    Intra-PROMA. With `divergence`, tokens that left DPPO's trust region are masked, before any projection.

    Beside GRPO's metrics it logs `projection/norm_ratio`, `projection/bounded_fraction` and `projection/overlap`,
    with Intra-PROMA `intra/norm_ratio`, `intra/captured_inputs` and `intra/captured_grads`, and with a trust region
    `dppo/masked_fraction`, `dppo/divergence/mean`, `dppo/divergence/max` and `dppo/ratio/max`.

    Attributes:
        accumulation ([`ProjectedAccumulation`] or `None`):
            What accumulates gradients; `None` where settings amount to REINFORCE or DPPO, which need none.
        trust_region ([`TokenTrustRegion`] or `None`):
            What weighs tokens; `None` without `divergence`.

    Raises:
        ValueError: At construction, for a setting that can't be honoured or a layer without sequence gradients; by
            `train()`, for fewer prompts than a generation takes, of which construction warns; at the first batch, for
            token-level advantages.

    Example:

    ```python
    from datasets import load_dataset
    from proma_trl import PROMAConfig, PROMATrainer
    from trl.rewards import accuracy_reward

    trainer = PROMATrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=PROMAConfig(gradient_accumulation_steps=16),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "proma", "proma-trl"]
    _name = "PROMA"
    _config_class: ClassVar[type[PROMAConfig]] = PROMAConfig
    _paper: ClassVar[dict[str, str]] = PROMA().papers[0]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PROMAConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, self._config_class):
            own, given = self._config_class.__name__, type(args).__name__
            raise TypeError(
                f"`args` must be a `{own}`, got `{given}`. Write `{own}(...)` instead of `{given}(...)`: it takes the "
                "same settings, and names those that it has no use for."
            )
        region = args.trust_region()
        if region is not None:
            # Its ratio is the one to the sampler
            args.vllm_importance_sampling_correction = False
            if region.needs_top and rollout_func is not None:
                raise ValueError(
                    f"`divergence={args.divergence!r}` needs the most probable tokens at each position, which a "
                    '`rollout_func` does not return. Set `divergence="binary_tv"` or `"binary_kl"`.'
                )
        check_trl(args.device)
        # A stream has no length, and TRL refuses what is neither
        if isinstance(train_dataset, Dataset):
            problem = too_few_prompts(args, len(train_dataset), args.world_size)
            if problem is not None:  # before the model loads; `train` refuses it
                warnings.warn(problem, stacklevel=2)
        if rollout_func is None and environment_factory is None:  # which may add columns, and rewards
            check_trainer_rewards(reward_funcs, args, train_dataset, eval_dataset)
        acting = args.acting_methods()
        self._name = args.method_name()
        tags = dict.fromkeys(tag for method in acting for tag in method.tags)
        self._tag_names = ["trl", *tags, "proma-trl"]
        papers = list({paper["id"]: paper for method in acting for paper in method.papers}.values())
        self._paper, self._card_papers = papers[0] if papers else {}, tuple(papers[1:])
        self._card_settings = args.rule_settings()
        self._card_evidence = [EVIDENCE[method.name] for method in acting if method.name in EVIDENCE]
        adapters = _adapters_in_float32(model) if args.adapter_dtype == "float32" else {}
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            tools,
            rollout_func,
            environment_factory,
        )
        refusal = encoder_decoder_refusal(self.model)
        if refusal is not None:
            raise ValueError(refusal)
        check_trained(self.model)
        self.add_callback(RefuseNoSteps())
        self.add_callback(SayWhatRuns(self))
        prepare_head(self.model)
        if args.adapter_dtype == "float32" and is_quantized(self.model):
            _keep_in_float32(self.model, adapters)
        if self.aux_loss_enabled:
            raise ValueError(
                "The model's configuration declares a load-balancing loss (`router_aux_loss_coef`), which is not a "
                "multiple of the sequences' log-probability gradients, so PROMA can't project it. Set "
                "`router_aux_loss_coef=0.0` in `PROMAConfig`."
            )
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            check_server(self.vllm_generation.vllm_client, self.model)
            if region is not None:
                check_server_log_probs(self.vllm_generation.vllm_client, args)
        check_ranks_agree(self.accelerator, self.model)
        without_effect = settings_without_effect(args, self.accelerator, self.model)
        samples_here = not (self.use_vllm or self.use_transformers_continuous_batching or rollout_func)
        if region is not None and samples_here and getattr(self.model, "generation_config", None) is not None:
            without_effect += args.sampling_left_to_model(self.generation_config, self.model.generation_config)
        if without_effect and self.accelerator.is_main_process:
            for message in without_effect:
                warnings.warn(message, stacklevel=2)
            self.add_callback(_LogAtStart(logging.WARNING, without_effect))
        # Ratios stay unclipped
        self.epsilon_low = self.epsilon_high = math.inf
        self._checked = False
        self.trust_region = None if region is None else TokenTrustRegion(region)
        if region is not None:
            self._ask_sampler_for_log_probs()
        # The fused head is not given the last column. With a column of padding, that is no real token's, whose place
        # among the head's inputs, from which Intra-PROMA takes a subspace, would otherwise depend on the padding
        intra = args.intra_settings()
        self._padding = PaddingTrimmer(self.model, args.pad_to_multiple_of, spare=int(intra.removes and intra.head))
        self._microbatches = StepMicrobatches(self, orders=args.orders_by_length)
        self.accumulation: ProjectedAccumulation | None = None
        rule = args.update_rule()
        if intra.removes or not rule.is_plain:
            check_setup(self.accelerator, args.n_gpu, self.model)
            self.accumulation = self._new_accumulation(rule, args.largest_microbatch)
            if intra.removes and self.accelerator.is_main_process:
                self.add_callback(_LogAtStart(logging.INFO, [self._what_intra_projects()]))
            if self.accumulation.rerun_names() and self.accelerator.is_main_process:
                self.add_callback(_LogAtStart(logging.INFO, [self._what_runs_again()]))
            # A model that isn't trained can be copied and pickled; the first microbatch puts the hooks back
            self.accumulation.detach()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Trains as TRL's trainer does, and leaves the model as it does, without hooks."""
        self._microbatches.forget()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self.accumulation is not None:
                self.accumulation.detach()

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, Dataset):
            check_prompts(self.args, len(self.train_dataset), self.args.world_size)
        return super().get_train_dataloader()

    def _new_accumulation(self, rule: UpdateRule, microbatch_size: int) -> ProjectedAccumulation:
        args, intra = self.args, self.args.intra_settings()
        return ProjectedAccumulation(
            self.model,
            rule,
            microbatch_size=microbatch_size,
            memory_budget=args.projection_memory_budget,
            accelerator=self.accelerator,
            scope=args.projection_scope,
            accumulator_dtype=getattr(torch, args.projection_accumulator_dtype),
            intra_dim=intra.dim,
            intra_power_iterations=intra.power_iterations,
            intra_strength=intra.strength,
            intra_target=intra.target,
            intra_head=intra.head,
            seed=args.seed,
        )

    def _ask_sampler_for_log_probs(self) -> None:
        """The trust region is anchored on them; and TRL's mask of off-policy sequences takes its weights of tokens."""
        if self.use_vllm:
            self.vllm_generation.logprobs = self.trust_region.top_k
        elif self.use_transformers_continuous_batching:
            self.continuous_batching_config.return_logprobs = True
        if self.off_policy_mask_threshold is None:
            self.off_policy_mask_threshold = math.inf

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's microbatch; in training, the next one of the optimizer step as it is laid out."""
        inputs = super()._prepare_inputs(generation_batch)
        return self._microbatches.take() if self.model.training else inputs

    # With the signature of the installed TRL
    @functools.wraps(getattr(GRPOTrainer, SCORING))
    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        # Without running the model on columns of padding
        score = super()._get_per_token_logps_and_entropies
        if logits_to_keep == 0:
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        self._probe_padding(model)
        arguments = (score, model, input_ids, attention_mask, logits_to_keep)
        if batch_size is None or batch_size >= len(input_ids):
            return self._padding.score(*arguments, **kwargs)
        return self._padding.score_in_chunks(*arguments, size=batch_size, **kwargs)

    def _probe_padding(self, model: torch.nn.Module) -> None:
        def log_probs(ids: torch.Tensor, mask: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            run = functools.partial(model, **kwargs) if kwargs else model
            return super(PROMATrainer, self)._get_per_token_logps_and_entropies(run, ids, mask, ids.shape[1] - 1)[0]

        self._padding.probe(self, model, log_probs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        training = self.model.training
        mode = "train" if training else "eval"
        self._probe_padding(model)
        if training and self.accumulation is not None:
            _refuse_token_advantages(inputs["advantages"])
        if self.trust_region is not None:
            self._check_anchor(inputs)
        with self._token_weights(mode, inputs):
            # Before anything is accumulated in a step
            if training and not self._checked and (self.accumulation is None or self.accumulation.begins_step):
                self._checked = self._check_first_microbatch(model, inputs)
            if training and self.accumulation is not None:
                loss = self._projected_loss(model, inputs)
            else:
                with self._head(None, inputs):
                    loss = super()._compute_loss(model, inputs)
        if self.trust_region is not None and (not training or self.accelerator.sync_gradients):
            self.trust_region.reduce(mode, self.accelerator)
        metrics = self._metrics[mode]
        if training and metrics["entropy"]:
            # TRL averages over microbatches: with its share of the tokens, that is the mean over the step's tokens
            metrics["entropy"][-1] *= self._microbatches.token_share
        for name in [name for name in metrics if name.startswith("clip_ratio/")]:
            del metrics[name]
        return loss

    def _check_anchor(self, inputs: dict[str, Any]) -> None:
        """
        Check that a microbatch has the sampler's log-probabilities, and nothing that would weigh tokens by a second
        ratio.

        Raises:
            ValueError: If not. TRL's rollouts never hold more, but a subclass may add to them.
        """
        setting = f"`divergence={self.args.divergence!r}`"
        for name in ("old_per_token_logps", "importance_sampling_ratio"):
            if inputs.get(name) is not None:
                raise ValueError(
                    f"The microbatch holds `{name}`, and with {setting} the importance ratio is the one to the "
                    "sampler, in `sampling_per_token_logps`: tokens would be weighted by two ratios. Leave "
                    f"`{name}` out of what `_generate_and_score_completions` returns, or set `divergence=None`."
                )
        shape, sampled = tuple(inputs["completion_ids"].shape), inputs.get("sampling_per_token_logps")
        found = None if sampled is None else tuple(sampled.shape)
        if found != shape:
            what = "no `sampling_per_token_logps`" if found is None else f"`sampling_per_token_logps` of shape {found}"
            raise ValueError(
                f"The microbatch holds {what}, and {setting} needs the sampler's log-probabilities of completions of "
                f"shape {shape}. Keep those that `_generate_and_score_completions` returns, or set `divergence=None`."
            )

    def _projected_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss, linear in the advantages, taken apart: each sequence's part, and its advantage."""
        advantages = inputs["advantages"]
        weights = self.accumulation.sequence_weights(advantages).requires_grad_()
        with self.accumulation.capture() as microbatch, self._head(microbatch, inputs):
            objective = super()._compute_loss(model, {**inputs, "advantages": weights})
        (shares,) = torch.autograd.grad(objective, weights, retain_graph=True)
        value = (shares * advantages).sum()
        return self.accumulation.loss(objective, advantages, value=value, weights=weights)

    @contextmanager
    def _head(self, microbatch: Microbatch | None, inputs: dict[str, Any]) -> Iterator[None]:
        """The fused LM head, with all that is needed of it beyond log-probabilities of the sampled tokens."""
        with ExitStack() as stack:
            # Where sequence gradients are not simply the microbatch's
            if microbatch is not None and self.accumulation.follows_head:
                stack.enter_context(sequence_head(microbatch))
            if self.trust_region is not None:
                mask = inputs["completion_mask"]
                num_run = self._padding.columns(mask, mask.shape[1]).num_scored if self.trust_region.top_k else 0
                stack.enter_context(self.trust_region.reading_head(inputs, num_run))
            yield

    @contextmanager
    def _token_weights(self, mode: str, inputs: dict[str, Any]) -> Iterator[None]:
        """
        What TRL multiplies tokens' losses by where it masks off-policy sequences: that mask, and the trust region's
        weights. Both depend on the signs of advantages, in whose place the projected loss has other numbers.
        """
        original = self.get_off_policy_mask

        def weights(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
            advantages = inputs["advantages"].view_as(advantages)
            sequences = original(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold)
            if self.trust_region is None:
                return sequences
            tokens = self.trust_region.weights(
                mode, inputs, advantages, per_token_logps, sampling_per_token_logps, mask
            )
            return sequences * tokens

        with replaced(self, "get_off_policy_mask", weights):
            yield

    def _what_runs_again(self) -> str:
        names = self.accumulation.rerun_names()
        kinds = dict.fromkeys(type(self.model.get_submodule(name)).__name__ for name in names)
        return (
            f"{len(names)} modules have no rule for the gradients of single sequences and run again in the backward "
            f"pass, one sequence at a time: {', '.join(kinds)}. That costs one more forward pass of each, and memory "
            "for one gradient of its parameters a sequence."
        )

    def _what_intra_projects(self) -> str:
        trained = {name: whole_shape(p).numel() for name, p in self.model.named_parameters() if p.requires_grad}
        names = self.accumulation.projected_names()
        share = sum(trained[name] for name in names) / sum(trained.values())
        rest = [name for name in trained if name not in names]
        shown = ", ".join(f"`{name}`" for name in rest[:8]) + (f" and {len(rest) - 8} more" if rest[8:] else "")
        what = (
            f"Intra-PROMA projects the gradients of {len(names)} weights of linear layers, {share:.1%} of what is "
            "trained."
        )
        return f"{what} The other parameters keep their gradients: {shown}." if rest else what

    def _check_first_microbatch(self, model: torch.nn.Module, inputs: dict[str, Any]) -> bool:
        """
        Check that TRL's loss, and the model's layers, are what the methods above take them for.

        The loss speaks with other ranks, so that all of them go through the same checks.

        Returns:
            `bool`: Whether it could be checked: nothing is known from numbers that are not finite, or of the sequences
            of a microbatch that holds one.
        """

        def objective(weights: torch.Tensor, microbatch: Microbatch | None) -> torch.Tensor:
            with self._head(microbatch, inputs):
                return GRPOTrainer._compute_loss(self, model, {**inputs, "advantages": weights})

        with self._unlogged():
            if self.trust_region is not None and not self._on_all_ranks(self._check_token_weights(model, inputs)):
                return False
            if self.accumulation is None:
                return True
            if not self._check_linearity(model, inputs):
                return False
            k = len(inputs["advantages"])
            if self.accumulation.microbatch_size > 1 and not self._on_all_ranks(k > 1):
                return False
            return self._on_all_ranks(self.accumulation.check_sequences(objective, k))

    def _on_all_ranks(self, is_so: bool) -> bool:
        """Whether something is so on all ranks, which all ask together."""
        if self.accelerator.num_processes == 1:
            return is_so
        return bool(self.accelerator.gather(torch.tensor([is_so], device=self.accelerator.device)).all())

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Within the context, losses leave nothing in the metrics."""
        uncounted = nullcontext() if self.trust_region is None else self.trust_region.uncounted()
        with replaced(self, "_metrics", {mode: defaultdict(list) for mode in self._metrics}), uncounted:
            yield

    def _check_token_weights(self, model: torch.nn.Module, inputs: dict[str, Any]) -> bool:
        """
        Check that the loss multiplies each token's part by its weight, and by no ratio besides. Returns whether
        gradients are finite, so that they could be compared.

        Raises:
            RuntimeError: If it does not.
        """
        sampled = inputs["sampling_per_token_logps"].nan_to_num().float()
        weights = 0.5 + torch.arange(sampled.numel(), device=sampled.device).view_as(sampled) % 3

        def gradient(inputs: dict[str, Any], threshold: float | None) -> torch.Tensor:
            """By log-probabilities that are not the sampler's."""
            leaf = (sampled - weights).requires_grad_()
            scores = (leaf, torch.zeros_like(leaf), None)
            with (
                replaced(self, SCORING, lambda *args, **kwargs: scores),
                replaced(self, "off_policy_mask_threshold", threshold),
            ):
                return torch.autograd.grad(GRPOTrainer._compute_loss(self, model, inputs), leaf)[0]

        with replaced(self.trust_region, "weights", lambda *args: weights):
            found = gradient(inputs, math.inf)
        without = {name: x for name, x in inputs.items() if name != "sampling_per_token_logps"}
        want = weights * gradient(without, None)
        if not want.isfinite().all():
            return False
        if not (found - want).norm() <= 1e-4 * want.norm():
            raise RuntimeError(
                f"The loss of the installed TRL (`loss_type={self.loss_type!r}`) does not weigh tokens as its mask of "
                "off-policy sequences says, through which `divergence` acts, so that gradients would be wrong. "
                "Install a TRL version within the bounds of proma-trl's requirements, or set `divergence=None`."
            )
        return True

    def _check_linearity(self, model: torch.nn.Module, inputs: dict[str, Any]) -> bool:
        """
        Check that the loss is linear in the advantages: its value, and its gradient by the tokens' log-probabilities.
        Returns whether they are finite, so that they could be compared.

        Raises:
            RuntimeError: If it is not.
        """
        # As `_projected_loss` takes it, with what a class between TRL's and this one adds
        compute_loss = super()._compute_loss
        ones = torch.ones_like(inputs["advantages"], requires_grad=True)
        with (
            random_numbers_kept(ones.device),
            torch.no_grad(),
            self._head(None, inputs),
            recorded(self, SCORING) as scored,
        ):
            compute_loss(model, {**inputs, "advantages": ones.detach()})
        log_probs, *others = scored["result"]

        def loss_and_gradients(advantages: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """The loss, and its gradients by log-probabilities and advantages, without another forward pass."""
            leaf, advantages = log_probs.detach().requires_grad_(), advantages.detach().requires_grad_()
            with replaced(self, SCORING, lambda *args, **kwargs: (leaf, *others)):
                loss = compute_loss(model, {**inputs, "advantages": advantages})
            return loss.detach(), *torch.autograd.grad(loss, (leaf, advantages))

        advantages = inputs["advantages"]
        alternating = 1.0 - 2.0 * (torch.arange(len(advantages), device=advantages.device) % 2)
        advantages = torch.where(advantages == 0, alternating, advantages)
        tolerance = max(1e-4, 8 * torch.finfo(log_probs.dtype).eps)
        _, unit, shares = loss_and_gradients(ones)
        if not self._on_all_ranks(all(bool(x.isfinite().all()) for x in (advantages, unit, shares))):
            return False
        for factor in (1.0, -1.0, 2.0):
            loss, gradient, _ = loss_and_gradients(factor * advantages)
            parts, want = factor * advantages * shares, factor * advantages.unsqueeze(1) * unit
            if (loss - parts.sum()).abs() > tolerance * parts.abs().sum() or (
                gradient - want
            ).norm() > tolerance * want.norm():
                if compute_loss.__func__ is not GRPOTrainer._compute_loss:
                    raise RuntimeError(
                        f"`{compute_loss.__func__.__qualname__}` adds to TRL's loss what is not linear in the "
                        "advantages, as PROMA needs it. A term that belongs to no sequence would be taken for policy "
                        "gradient. Leave it out, or use `GRPOTrainer`."
                    )
                raise RuntimeError(
                    f"The loss of the installed TRL (`loss_type={self.loss_type!r}`) is not linear in the advantages, "
                    "as PROMA needs it, so that gradients would be wrong. Install a TRL version within the bounds of "
                    "proma-trl's requirements, or use `GRPOTrainer`."
                )
        return True

    def _generate_single_turn(
        self,
        prompt_ids: list,
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        """
        TRL's generation, with the sampler's log-probabilities where a trust region needs them. A vLLM server that
        fails ends training, but not what was trained.
        """
        arguments = (prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        try:
            if self.trust_region is None:
                return super()._generate_single_turn(*arguments)
            with sampler_log_probs(self, self.trust_region.top_k) as log_probs_of:
                completion_ids, _ = super()._generate_single_turn(*arguments)
            return completion_ids, log_probs_of(completion_ids)
        except Exception as error:
            # The main process alone speaks with the server
            if not (self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process):
                raise
            url, saved = self.vllm_generation.vllm_client.base_url, self._save_before_failing()
            raise RuntimeError(
                f"The vLLM server at {url} failed at step {self.state.global_step}: {error}\n{saved} Look into the "
                "server's log, start it again, and resume."
            ) from error

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout. Where a trust region is anchored on the sampler, TRL need not run the policy again."""
        unscored = nullcontext()
        if self.trust_region is not None:
            unscored = replaced(self, SCORING, lambda *args, **kwargs: (None, None, None))
        with self._checked_generation() as calls, unscored:
            rollout = super()._generate_and_score_completions(inputs)
        if self.trust_region is not None:
            self.trust_region.complete_rollout(rollout, calls["log_probs"])
        return rollout

    @contextmanager
    def _checked_generation(self) -> Iterator[dict[str, Any]]:
        """
        Within the context, log-probabilities that a user's code returns with completions are checked, where they
        count. They are kept as `"log_probs"`.
        """
        original, calls = self._generate, {}

        def generate(prompts: list) -> Any:
            generated = original(prompts)
            _, completion_ids, masks, _, calls["log_probs"], *_ = generated
            needed_by, way_out = self._needs_log_probs(calls["log_probs"] is not None)
            if needed_by:
                check_log_probs(calls["log_probs"], completion_ids, masks, needed_by, way_out)
            return generated

        with replaced(self, "_generate", generate):
            yield calls

    def _needs_log_probs(self, given: bool) -> tuple[str | None, str]:
        """The setting for which the sampler's log-probabilities are needed, if any, and what to do without them."""
        if self.trust_region is not None:
            return f"`divergence={self.args.divergence!r}`", "set `divergence=None`"
        if self.rollout_func is None:
            return None, ""
        if self.use_vllm and self.vllm_importance_sampling_correction:
            name = "vllm_importance_sampling_correction"
            return f"`{name}=True`", f"set `{name}=False`"
        # Without them, TRL takes the policy's own
        if given and self.off_policy_mask_threshold is not None:
            name = "off_policy_mask_threshold"
            return f"`{name}={self.off_policy_mask_threshold!r}`", f"leave `{name}` out"
        return None, ""

    def _save_before_failing(self) -> str:
        """Save a checkpoint if this rank can by itself. Returns what became of it."""
        if self.state.global_step == 0:
            return "No optimizer step had been taken."
        if self.accelerator.num_processes > 1 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return "What is trained is spread over ranks, so nothing could be saved: the last checkpoint stands."
        self._save_checkpoint(self.model, trial=None)
        return f"What was trained is in {self.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.accumulation is not None and self.model.training:
            for name, value in self.accumulation.pop_metrics().items():
                self._metrics["train"][name].append(value)
        if self.trust_region is not None:
            mode = "train" if self.model.training else "eval"
            for name, value in self.trust_region.pop_metrics(mode).items():
                self._metrics[mode][name].append(value)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # They are there first, as TRL may push what it has saved
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._save_rollout(folder)
        self._save_rule(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollout(Path(checkpoint))
            self._load_rule(Path(checkpoint))

    def _save_rollout(self, folder: Path) -> None:
        """Between two optimizer steps on one generation, TRL would forget the completions and generate again."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            return
        rollout = {
            "global_step": self.state.global_step,
            "made_for": self._rollout_settings(),
            "step": self._step,
            "inputs": self._buffered_inputs,
        }
        folder.mkdir(parents=True, exist_ok=True)  # each node may have a disk of its own
        torch.save(rollout, folder / self._rollout_file())

    def _load_rollout(self, folder: Path) -> None:
        """Take up a rollout, if all ranks have theirs and it fits. Else TRL generates anew, as `GRPOTrainer` does."""
        rollout, problem = self._read_rollout(folder / self._rollout_file())
        # Ranks generate together, or none does
        found = gather_object([(rollout is not None, problem)])
        if all(fits for fits, _ in found):
            self._step = rollout["step"]
            self._buffered_inputs = send_to_device(rollout["inputs"], self.accelerator.device, skip_keys=ON_CPU)
            return
        problems = [problem for _, problem in found if problem is not None]
        if not problems and any(fits for fits, _ in found):
            missing = [str(rank) for rank, (fits, _) in enumerate(found) if not fits]
            problems.append(f"process {', '.join(missing)} has none")
        if problems and self.accelerator.is_main_process:
            logger.warning(f"The rollout in {folder} is left out, and completions are generated anew: {problems[0]}.")

    def _read_rollout(self, path: Path) -> tuple[dict[str, Any] | None, str | None]:
        """This rank's rollout, if there is one that fits, or why it does not."""
        if not path.is_file():
            return None, None
        try:
            rollout = torch.load(path, map_location="cpu", weights_only=True)
            made_for, step, _, _ = _made_for(rollout), rollout["global_step"], rollout["step"], rollout["inputs"]
        except Exception as error:  # each way to damage a file has its own
            return None, f"`{path.name}` can't be read ({type(error).__name__}: {error})"
        # It is another step's where checkpoints replace each other, as `last-checkpoint` on the Hub: nothing is lost
        if step != self.state.global_step:
            return None, None
        now = self._rollout_settings()
        different = [
            f"`{name}` was {value!r} when it was made, and is {now[name]!r}"
            for name, value in made_for.items()
            if name in now and value != now[name]
        ]
        return (None, "; ".join(different)) if different else (rollout, None)

    def _rollout_settings(self) -> dict[str, Any]:
        """What a rollout is made for, by name: with other values, the rest of it is of no use."""
        return {
            "num_processes": self.accelerator.num_processes,
            "divergence": None if self.trust_region is None else _anchor(self.trust_region.top_k),
            **{name: getattr(self.args, name) for name in _ROLLOUT_SETTINGS},
        }

    def _save_rule(self, folder: Path) -> None:
        state = {} if self.accumulation is None else self.accumulation.state_dict()
        if state and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({**self._rule_settings(), "state": state}, folder / _RULE_FILE)

    def _load_rule(self, folder: Path) -> None:
        if self.accumulation is None or not (folder / _RULE_FILE).is_file():
            return
        name = self.accumulation.name
        try:
            saved = torch.load(folder / _RULE_FILE, map_location="cpu", weights_only=True)
            rule, state = saved["rule"], saved["state"]
        except Exception as error:  # as above
            logger.warning(
                "`%s` in %s can't be read (%s: %s): %s starts without its state.",
                *(_RULE_FILE, folder, type(error).__name__, error, name),
            )
            return
        now = self._rule_settings()
        # A file of an earlier version has the rule alone
        if rule != name:
            logger.warning("%s holds the state of %s: %s starts without one.", folder, rule, name)
        elif saved.get("isopo", now["isopo"]) != now["isopo"]:
            logger.warning(
                "%s holds the running means of `isopo=%r`: `isopo=%r` starts without them.",
                *(folder, saved["isopo"], now["isopo"]),
            )
        elif other := set(saved.get("parameters", now["parameters"])).symmetric_difference(now["parameters"]):
            logger.warning(
                "%s holds the state of %s for other parameters than are trained, in which `%s` differs: it starts "
                "without one.",
                *(folder, rule, min(other)),
            )
        else:
            self.accumulation.load_state_dict(state)

    def _rule_settings(self) -> dict[str, Any]:
        """What the update rule's state is of."""
        trained = [name for name, param in self.model.named_parameters() if param.requires_grad]
        return {"rule": self.accumulation.name, "isopo": self.args.isopo, "parameters": trained}

    def _rollout_file(self) -> str:
        return f"rollout_{self.accelerator.process_index}.pt"


def _made_for(rollout: dict[str, Any]) -> dict[str, Any]:
    """What a saved rollout was made for, by name; of an earlier version's, what can be known."""
    if "made_for" in rollout:
        return rollout["made_for"]
    return {
        "num_processes": rollout["ranks"],
        "divergence": _anchor(rollout.get("top_k")),
        "per_device_train_batch_size": len(rollout["inputs"][0]["completion_ids"]),
        "steps_per_generation": len(rollout["inputs"]),
    }


def _anchor(top_k: int | None) -> str | None:
    """What a trust region needs of a rollout: log-probabilities of the sampled tokens, or of others as well."""
    return None if top_k is None else "binary" if top_k == 0 else f"top-{top_k}"


def _refuse_token_advantages(advantages: torch.Tensor) -> None:
    if advantages.dim() != 1:
        raise ValueError(
            f"Advantages of shape {tuple(advantages.shape)} weigh tokens, not sequences: the policy gradient is then "
            "no sum of multiples of the sequences' log-probability gradients, and PROMA can't project it. Give one "
            "advantage a sequence, or use `GRPOTrainer`."
        )


def _adapters_in_float32(model: str | torch.nn.Module) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The adapters that a model comes with, which TRL is about to cast to bfloat16 if the model is quantized."""
    params = model.parameters() if isinstance(model, torch.nn.Module) and is_quantized(model) else ()
    return {param: param.data for param in params if param.requires_grad and param.dtype == torch.float32}


def _keep_in_float32(model: torch.nn.Module, adapters: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Undo TRL's cast of adapters: those in `adapters` get back what they were, new ones were random or zero."""
    saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    # Copies of whole modules are run on what the base model gives them, in its dtype
    dtypes = {
        param: original.dtype
        for wrapper in saved
        for copy in wrapper.modules_to_save.values()
        for param, original in zip(copy.parameters(), wrapper.original_module.parameters(), strict=True)
    }
    for param in model.parameters():
        if param.requires_grad:
            param.data = adapters.get(param, param.data).to(dtypes.get(param, torch.float32))
