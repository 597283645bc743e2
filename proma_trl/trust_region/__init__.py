"""DPPO: a trust region on the policy's divergence, token by token."""

from .trust_region import TokenWeights, TopLogProbs, TrustRegion

__all__ = ["TokenWeights", "TopLogProbs", "TrustRegion"]
