"""DPPO, Divergence Proximal Policy Optimization (arXiv 2602.04879): a trust region in the place of ratio clipping.

For a sampled token with probability mu under the policy that sampled it, pi under the current one, and r = pi / mu,
the loss is

    - advantage * sg(min(r, C)) * sg(M) * log pi

with sg the stopped gradient, and M = 0 for a token that an update would move further out of the trust region: where

    (advantage > 0 and r > 1 and D > high)  or  (advantage < 0 and r < 1 and D > low)

and M = 1 elsewhere. D is a divergence between mu and pi at the token's position.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..validation import check_choice, check_real, check_whole
from . import divergences

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
MASKS = ("directional", "symmetric")

# The paper's, for total variation and for KL divergence
_THRESHOLDS = {"tv": 0.15, "kl": 0.05}

# Log-ratios are clamped here before they are exponentiated
_MAX_LOG_RATIO = 20.0

_TITLE = "Rethinking the Trust Region in LLM Reinforcement Learning"
_PAPER = {
    "title": _TITLE,
    "id": "2602.04879",
    "citation": f"""\
@article{{qi2026rethinking,
    title        = {{{{{_TITLE}}}}},
    author       = {{Penghui Qi and Xiangxin Zhou and Zichen Liu and Tianyu Pang and Chao Du and Min Lin and
                     Wee Sun Lee}},
    year         = 2026,
    eprint       = {{arXiv:2602.04879}},
}}""",
}


@dataclass(frozen=True)
class TopLogProbs:
    """
    Log-probabilities of the tokens beside the sampled one that were most probable when it was sampled.

    Attributes:
        sampler (`(..., K)`): Under the policy that sampled; `-inf` where there is no such token.
        current (`(..., K)`): Of the same tokens under the current policy; any value where there is none.
    """

    sampler: torch.Tensor
    current: torch.Tensor


@dataclass(frozen=True)
class TokenWeights:
    """
    What a trust region makes of each token; all of one shape.

    Attributes:
        weights: `min(r, C) * M`, what multiplies the gradient of `log pi`. Float32 or float64.
        masked: Where `M = 0`.
        capped: Where `r > C`.
        missing: Where the sampler's log-probability is not known.
        ratio: `r`, 1 where it is not known.
        divergence: `D`, 0 where it is not known.
    """

    weights: torch.Tensor
    masked: torch.Tensor
    capped: torch.Tensor
    missing: torch.Tensor
    ratio: torch.Tensor
    divergence: torch.Tensor


@dataclass(frozen=True)
class TrustRegion:
    """
    Settings of DPPO.

    Args:
        divergence (`str`, defaults to `"binary_tv"`):
            D: `"binary_tv"`, `"binary_kl"`, `"topk_tv"` or `"topk_kl"`. Total variation is between 0 and 1, KL
            divergence `KL(mu || pi)` in nats. Binary: between "the sampled token" and "another". Top-K: between the K
            most probable tokens of mu, the sampled one, and the rest.
        threshold (`float`, *optional*):
            `low`. By default 0.15 for total variation and 0.05 for KL divergence.
        threshold_high (`float`, *optional*):
            `high`. By default `threshold`.
        top_k (`int`, defaults to `20`):
            K of the top-K divergences.
        mask (`str`, defaults to `"directional"`):
            `"directional"`: as above. `"symmetric"`: where D is above `high` and r > 1, or above `low` and r < 1,
            whatever the sign of the advantage. Tokens with an advantage of zero are never masked.
        ratio_cap (`float`, *optional*):
            C, a positive number. By default there is none. A capped token keeps its gradient.

    Raises:
        ValueError: If a value is outside its range.
    """

    divergence: str = "binary_tv"
    threshold: float | None = None
    threshold_high: float | None = None
    top_k: int = 20
    mask: str = "directional"
    ratio_cap: float | None = None

    name: ClassVar[str] = "DPPO"
    tags: ClassVar[tuple[str, ...]] = ("dppo",)
    papers: ClassVar[tuple[dict[str, str], ...]] = (_PAPER,)

    def __post_init__(self) -> None:
        check_trust_region(self.divergence, self.threshold, self.threshold_high, self.top_k, self.mask, self.ratio_cap)

    @property
    def thresholds(self) -> tuple[float, float]:
        """`low` and `high`."""
        low = _THRESHOLDS[self.divergence[-2:]] if self.threshold is None else float(self.threshold)
        return low, low if self.threshold_high is None else float(self.threshold_high)

    @property
    def needs_top(self) -> bool:
        """Whether the divergence takes the sampler's most probable tokens."""
        return self.divergence.startswith("topk")

    def token_weights(
        self,
        advantages: torch.Tensor,
        log_probs: torch.Tensor,
        sampler_log_probs: torch.Tensor,
        top: TopLogProbs | None = None,
    ) -> TokenWeights:
        """
        Weigh the sampled tokens.

        Args:
            advantages: Of any shape that broadcasts to the next one's.
            log_probs: Of the sampled tokens under the current policy. Needs no gradient.
            sampler_log_probs: The same under the policy that sampled; NaN where it is not known.
            top ([`TopLogProbs`], *optional*): For the top-K divergences.
        """
        log_probs = log_probs.detach().to(torch.promote_types(log_probs.dtype, torch.float32))
        missing = sampler_log_probs.isnan()
        sampler_log_probs = torch.where(missing, log_probs, sampler_log_probs.to(log_probs.dtype))
        log_ratio = (log_probs - sampler_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        divergence = self._divergence(sampler_log_probs, log_probs, top).masked_fill(missing, 0)
        masked = self._leaves(advantages, log_ratio, divergence)
        cap = float("inf") if self.ratio_cap is None else self.ratio_cap
        return TokenWeights(
            weights=ratio.clamp(max=cap).masked_fill(masked, 0),
            masked=masked,
            capped=ratio > cap,
            missing=missing,
            ratio=ratio,
            divergence=divergence,
        )

    def _divergence(self, log_mu: torch.Tensor, log_pi: torch.Tensor, top: TopLogProbs | None) -> torch.Tensor:
        if not self.needs_top:
            return (divergences.binary_tv if self.divergence == "binary_tv" else divergences.binary_kl)(log_mu, log_pi)
        function = divergences.top_tv if self.divergence == "topk_tv" else divergences.top_kl
        return function(log_mu, log_pi, top.sampler.to(log_mu.dtype), top.current.to(log_mu.dtype))

    def _leaves(self, advantages: torch.Tensor, log_ratio: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        """Where an update would move a token further away from the policy that sampled it."""
        low, high = self.thresholds
        up, down = (log_ratio > 0) & (divergence > high), (log_ratio < 0) & (divergence > low)
        if self.mask == "symmetric":
            return (up | down) & (advantages != 0)
        return (up & (advantages > 0)) | (down & (advantages < 0))


def check_trust_region(
    divergence: Any, threshold: Any, threshold_high: Any, top_k: Any, mask: Any, ratio_cap: Any, prefix: str = ""
) -> None:
    """
    Check settings of [`TrustRegion`].

    Args:
        divergence, threshold, threshold_high, top_k, mask, ratio_cap: The settings.
        prefix (`str`, *optional*): What the names of those between `divergence` and `ratio_cap` begin with where the
            user has set them.

    Raises:
        ValueError: If a value is outside its range.
    """
    check_choice("divergence", divergence, DIVERGENCES)
    for name, value in ((f"{prefix}threshold", threshold), (f"{prefix}threshold_high", threshold_high)):
        if value is None:
            continue
        if divergence.endswith("tv"):
            check_real(name, value, "above 0 and at most 1, as total variation is", sys.float_info.min, 1.0)
        else:
            check_real(name, value, "a finite number of at least 0")
    check_whole(f"{prefix}top_k", top_k)
    check_choice(f"{prefix}mask", mask, MASKS)
    if ratio_cap is not None:
        check_real(
            "ratio_cap",
            ratio_cap,
            "a positive, finite number",
            sys.float_info.min,
            way_out="For no cap, set `ratio_cap=None`.",
        )
