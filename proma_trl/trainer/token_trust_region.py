"""DPPO in the trainer: the sampler's log-probabilities meet the current policy's, and tokens get their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from ..trust_region import TokenWeights, TopLogProbs, TrustRegion
from .sampler_log_probs import top_tensors
from .top_log_probs import top_log_probs
from .trl_internals import replaced

# What a rollout holds for the top-K divergences, beside TRL's `sampling_per_token_logps`
TOP_IDS = "sampling_top_ids"
TOP_LOG_PROBS = "sampling_top_logps"
# They are needed a microbatch at a time
ON_CPU = [TOP_IDS, TOP_LOG_PROBS]


class TokenTrustRegion:
    """
    Weighs tokens by a trust region, and keeps the statistics.

    Args:
        region ([`TrustRegion`]): The trust region.
    """

    def __init__(self, region: TrustRegion):
        self.region = region
        self.statistics = {"train": Statistics(), "eval": Statistics()}
        self._found: list[torch.Tensor] = []

    @property
    def top_k(self) -> int:
        """Number of most probable tokens that the sampler is asked for."""
        return self.region.top_k if self.region.needs_top else 0

    def complete_rollout(self, rollout: dict[str, Any], sampled: Sequence[Sequence[float]]) -> None:
        """
        Add the sampler's most probable tokens to a rollout. They stay on the CPU: K ids and numbers a token.

        Args:
            rollout (`dict`): What TRL makes of completions.
            sampled: Log-probabilities as the sampler gave them.
        """
        if self.top_k:
            length = rollout["completion_ids"].shape[1]
            rollout[TOP_IDS], rollout[TOP_LOG_PROBS] = top_tensors(sampled, length, self.top_k)

    @contextmanager
    def reading_head(self, inputs: Mapping[str, Any], num_run: int) -> Iterator[None]:
        """
        Within the context, TRL's fused head also gives the current policy's log-probabilities of the sampler's most
        probable tokens.

        Args:
            inputs (`Mapping`): A microbatch, as TRL's loss takes it.
            num_run (`int`): How many columns of completions the model runs on.
        """
        if not self.top_k:
            yield
            return
        with top_log_probs(inputs[TOP_IDS], inputs["completion_mask"].bool(), num_run) as found:
            self._found = found
            yield

    def weights(
        self,
        mode: str,
        inputs: Mapping[str, Any],
        advantages: torch.Tensor,
        log_probs: torch.Tensor,
        sampler_log_probs: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Weights of a microbatch's tokens, `(k, T)`.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            inputs (`Mapping`): The microbatch, as TRL's loss takes it.
            advantages (`(k, 1)` or `(k, T)`): True advantages.
            log_probs, sampler_log_probs (`(k, T)`): Of the sampled tokens, now and when they were sampled.
            mask (`(k, T)`): 1 for the tokens that count.
        """
        top = None
        if self.top_k:
            top = TopLogProbs(inputs[TOP_LOG_PROBS].to(log_probs.device), self._found[-1])
        found = self.region.token_weights(advantages, log_probs, sampler_log_probs, top)
        self.statistics[mode].add(found, advantages.expand_as(found.weights), mask.bool())
        return found.weights

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within the context, weights are no part of the statistics."""
        with replaced(self, "statistics", {mode: Statistics() for mode in self.statistics}):
            yield

    def reduce(self, mode: str, accelerator: Accelerator) -> None:
        """Add up what all ranks have seen since the last call, which all ranks make."""
        self.statistics[mode].reduce(accelerator)

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """Metrics over what has been added up since the last call."""
        metrics = self.statistics[mode].pop()
        if self.region.ratio_cap is None:
            metrics.pop("dppo/ratio/capped_fraction", None)
        return metrics


class Statistics:
    """Sums and maxima over tokens, on the device: those of this rank, and those of all ranks."""

    def __init__(self):
        self._own: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._all: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, found: TokenWeights, advantages: torch.Tensor, mask: torch.Tensor) -> None:
        """Count a microbatch's tokens: those of `mask`, `(k, T)`."""
        up, down = mask & (advantages > 0), mask & (advantages < 0)
        counted = [mask, up, down, *(part & found.masked for part in (mask, up, down))]
        counted += [mask & found.capped, mask & found.missing]
        sums = [part.sum().float() for part in counted] + [(found.divergence * mask).sum().float()]
        maxima = [(x * mask).amax().float() for x in (found.divergence, found.ratio)]
        self._own.append((torch.stack(sums), torch.stack(maxima)))

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up over ranks, which all call this after as many microbatches."""
        if self._own:
            sums, maxima = _together(self._own)
            sums = accelerator.reduce(sums, reduction="sum")
            self._all.append((sums, accelerator.gather(maxima.unsqueeze(0)).amax(0)))
            self._own.clear()

    def pop(self) -> dict[str, float]:
        """Metrics of all ranks' tokens. The only place that waits for the device."""
        if not self._all:
            return {}
        sums, (divergence, ratio) = (x.tolist() for x in _together(self._all))
        self._all.clear()
        tokens, up, down, masked, masked_up, masked_down, capped, missing, total = sums
        shares = {
            "dppo/masked_fraction": (masked, tokens),
            "dppo/masked_fraction/positive": (masked_up, up),
            "dppo/masked_fraction/negative": (masked_down, down),
            "dppo/divergence/mean": (total, tokens - missing),
            "dppo/ratio/capped_fraction": (capped, tokens),
            "dppo/missing_fraction": (missing, tokens),
        }
        found = {name: part / whole for name, (part, whole) in shares.items() if whole > 0}
        return {**found, "dppo/divergence/max": divergence, "dppo/ratio/max": ratio}


def _together(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    sums, maxima = (torch.stack(x) for x in zip(*parts, strict=True))
    return sums.sum(0), maxima.amax(0)
