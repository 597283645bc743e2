"""How far the policy moves: KL divergences between policies of one run, on the sequences that it trains on."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from ..backends import weights_are_sharded
from ..trainer.padding import TOKEN_INPUTS, PaddingTrimmer
from .measurement import PolicyMeasurement

_VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# GiB of logits that are held at a time
_LOGITS_BUDGET = 0.5


def sampled_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    r"""
    Estimates `KL(p || q)` of the next token from one token `x` drawn from `p`.

    $$\frac{q(x)}{p(x)} - 1 - \log\frac{q(x)}{p(x)}$$

    Unbiased if `q` does not depend on `x`, and never negative. The ratio, whose expectation is one, serves as control
    variate, which leaves a variance of second order in the policies' difference (Schulman, "Approximating KL
    Divergence", 2020: the estimator k3).

    Args:
        log_p (`torch.Tensor`), log_q (`torch.Tensor`):
            Log-probabilities of the tokens drawn, of any one shape.

    Returns:
        `torch.Tensor` of that shape, in nats, float32.
    """
    log_ratio = log_q.float() - log_p.float()
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """
    `KL(p || q)` of the next token, summed over the whole vocabulary.

    Args:
        log_p (`torch.Tensor`), log_q (`torch.Tensor`):
            Log-probabilities of all tokens, of shape `(..., vocabulary)`.

    Returns:
        `torch.Tensor` of shape `(...)`, in nats, float32.
    """
    log_p, log_q = log_p.float(), log_q.float()
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass
class _Policy:
    """A policy at some places: one drawn token's log-probability at each `(k, T, 1)`, or all `(k, T, vocabulary)`."""

    log_probs: torch.Tensor
    tokens: torch.Tensor | None = None

    def divergence(self, log_probs: torch.Tensor) -> torch.Tensor:
        """`KL(self || other)` at each place `(k, T)`, given all the other's log-probabilities."""
        if self.tokens is None:
            return exact_kl(self.log_probs, log_probs)
        return sampled_kl(self.log_probs, log_probs.gather(-1, self.tokens)).squeeze(-1)


class PolicyMetrics(PolicyMeasurement):
    r"""
    Logs how far the policy moves, on the sequences of the very step that moves it, as means over their tokens in nats:

    - `kl/local`: `KL(before || after)` between the policies before and after an optimizer step;
    - `kl/lagged`: `KL(after || lagged)` from the policy `lag` optimizer steps earlier, a running mean over the last
      `window` steps, as in the figures of the paper (40);
    - `kl/global`: `KL(after || initial)` from the policy with which the trainer was made.

    The policy's entropy is among the trainer's own metrics (`entropy`), in full and for every step.

    Divergences are those of the next token, at every place of the step's completions, estimated by [`sampled_kl`] from
    one token that is drawn anew there. The tokens of the completions themselves would give a biased picture: the step
    was made to change their probabilities, and PROMA was made to change them less.

    **Cost.** A forward pass is about a third of a microbatch's training. A measured step takes two over all of its
    sequences, one more for each of `kl/lagged` and `kl/global`; completions are not generated. `kl/global` keeps a
    copy of the trainable weights, `kl/lagged` one for each measurement within `lag` steps. With PEFT, adapters alone
    are trainable and copied. Logits take half a GiB at a time, or one sequence's if that is more. With `exact=True`,
    the probabilities of all tokens of the vocabulary are kept for the step's sequences: for small vocabularies.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]):
            The trainer to which the callback will be added: TRL's own, [`PROMATrainer`] or another subclass.
        every_steps (`int`, *optional*, defaults to `1`):
            Optimizer steps between two measurements.
        lag (`int`, *optional*):
            Optimizer steps between the two policies of `kl/lagged`. Without it, that is not measured. After a run is
            resumed, measurements begin again when `lag` steps have been made.
        window (`int`, *optional*, defaults to `40`):
            Optimizer steps over which `kl/lagged` is averaged.
        initial (`bool`, *optional*, defaults to `True`):
            Whether to measure `kl/global`.
        exact (`bool`, *optional*, defaults to `False`):
            Whether to sum over the vocabulary ([`exact_kl`]) instead of estimating.

    Raises:
        ValueError: For numbers that are not positive.
        TypeError: For a trainer that does not sample from its policy.
        RuntimeError: When training begins, for weights that are spread over ranks (ZeRO-3, FSDP) where `kl/lagged` or
            `kl/global` would need copies of them.

    Example:

    ```python
    trainer.add_callback(PolicyMetrics(trainer, every_steps=10))
    ```
    """

    def __init__(
        self,
        trainer: GRPOTrainer | RLOOTrainer,
        every_steps: int = 1,
        *,
        lag: int | None = None,
        window: int = 40,
        initial: bool = True,
        exact: bool = False,
    ):
        for name, value in (("lag", lag), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} has to be at least 1.")
        super().__init__(trainer, every_steps)
        self.lag = lag
        self.window = window
        self.exact = exact
        # Before a checkpoint is loaded: a resumed run measures from where it began.
        self._initial = self.copy_weights() if initial else None
        self._snapshots: dict[int, dict[str, torch.Tensor]] = {}
        self._lagged: deque[tuple[int, float]] = deque()
        self._before: list[list[_Policy]] = []
        self._padding = PaddingTrimmer(trainer.model)
        # Its own, so that training draws what it would have drawn
        self._generator = torch.Generator(trainer.accelerator.device).manual_seed(trainer.args.seed)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        trainer = self.trainer
        if (self.lag or self._initial is not None) and weights_are_sharded(trainer.accelerator):
            raise RuntimeError(
                "The policy's weights are spread over ranks, so PolicyMetrics can't keep copies of them for "
                "`kl/lagged` and `kl/global`. Pass `lag=None, initial=False` to measure `kl/local` alone, or train "
                "with ZeRO-2 or DDP."
            )
        self._snapshots.clear()
        self._lagged.clear()
        self._keep_snapshot(state.global_step)
        self.begin_recording(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self._before = [
            [self._keep(log_probs) for _, log_probs in self._log_probs(inputs)] for inputs in self.microbatches
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        step = state.global_step
        self._keep_snapshot(step)
        if not self.is_measured(step):
            return
        others = {"kl/lagged": self._snapshots.pop(step - (self.lag or 0), None), "kl/global": self._initial}
        others = {name: weights for name, weights in others.items() if weights is not None}
        totals = dict.fromkeys(["kl/local", *others], 0.0)
        places = 0
        for inputs, before in zip(self.microbatches, self._before, strict=True):
            after = []
            for policy, (counted, log_probs) in zip(before, self._log_probs(inputs), strict=True):
                places += counted.sum()
                totals["kl/local"] += policy.divergence(log_probs)[counted].sum()
                if others:
                    after.append(self._keep(log_probs))
            for name, weights in others.items():
                with self.weights(weights):
                    for policy, (counted, log_probs) in zip(after, self._log_probs(inputs), strict=True):
                        totals[name] += policy.divergence(log_probs)[counted].sum()
        self.microbatches, self._before = [], []
        self._record(totals, places, step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.end_recording()
        self._before = []

    def _keep_snapshot(self, step: int) -> None:
        if self.lag and self.is_measured(step + self.lag):
            self._snapshots[step] = self.copy_weights()

    def _record(self, totals: dict[str, torch.Tensor], places: torch.Tensor, step: int) -> None:
        """Averages over the places of all ranks, and hands the means to the trainer's next log."""
        sums = self.trainer.accelerator.reduce(torch.stack([*totals.values(), places.float()]), "sum").tolist()
        if sums[-1] == 0:
            return
        for name, total in zip(totals, sums[:-1], strict=True):
            value = total / sums[-1]
            if name == "kl/lagged":
                self._lagged.append((step, value))
                while self._lagged[0][0] <= step - self.window:
                    self._lagged.popleft()
                value = sum(kept for _, kept in self._lagged) / len(self._lagged)
            self.trainer._metrics["train"][name].append(value)

    @torch.no_grad()
    def _log_probs(self, inputs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of a few sequences at a time, which places count `(k, T)` and all log-probabilities `(k, T, vocabulary)`."""
        trainer = self.trainer
        input_ids, attention_mask, counted = self.sequences(inputs)
        vision = {name: inputs[name] for name in _VISION_INPUTS if name in inputs}
        with self.as_it_generates():
            self._padding.probe(trainer, trainer.model, self._token_log_probs)
            columns = self._padding.columns(attention_mask, counted.size(1), bool(vision))
            kept = slice(columns.start, columns.stop)
            input_ids, attention_mask = input_ids[:, kept], attention_mask[:, kept]
            counted = counted[:, : columns.num_scored]
            vision |= {name: vision[name][:, kept] for name in TOKEN_INPUTS if name in vision}
            step = len(input_ids) if vision else self._sequences_at_a_time(input_ids.size(1))
            for start in range(0, len(input_ids), step):
                few = slice(start, start + step)
                positions = self._padding.positions(columns, input_ids[few], bool(vision))
                with trainer.accelerator.autocast():
                    logits = trainer.model(
                        input_ids=input_ids[few], attention_mask=attention_mask[few], **vision, **positions
                    ).logits
                logits = logits[:, -counted.size(1) - 1 : -1].float()
                yield counted[few], (logits / trainer.temperature).log_softmax(-1)

    def _token_log_probs(self, ids: torch.Tensor, mask: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        with self.trainer.accelerator.autocast():
            logits = self.trainer.model(input_ids=ids, attention_mask=mask, **options).logits
        return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)

    def _sequences_at_a_time(self, length: int) -> int:
        if weights_are_sharded(self.trainer.accelerator):
            # All ranks have to run the model equally often, and lengths differ between them
            return 1
        vocabulary = self.trainer.model.config.get_text_config().vocab_size
        return max(1, int(_LOGITS_BUDGET * 2**30) // (4 * length * vocabulary))

    def _keep(self, log_probs: torch.Tensor) -> "_Policy":
        if self.exact:
            return _Policy(log_probs)
        # The largest of p over exponential noise is a sample from p
        noise = torch.empty_like(log_probs).exponential_(generator=self._generator)
        tokens = (log_probs.exp() / noise).argmax(-1, keepdim=True)
        return _Policy(log_probs.gather(-1, tokens), tokens)
