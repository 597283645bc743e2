"""Divergences between the policy that sampled, mu, and the current one, pi, at one position each.

All arguments are log-probabilities, finite, float32 or float64. Complements are taken with `expm1`, so that they keep
their precision near probabilities of one. Below what a log-probability in float32 can tell, 2^-24, they are not
distinguished from it: every divergence is finite.
"""

import torch

# Probabilities are no smaller, so that logarithms of zero are finite
_MIN_LOG_PROB = -100.0
_MIN_COMPLEMENT = 2.0**-24


def binary_tv(log_mu: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
    """Total variation between the events "this token" and "another one": `|mu - pi|`. Any shape."""
    return (log_mu.exp() - log_pi.exp()).abs()


def binary_kl(log_mu: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
    """`KL(mu || pi)` between the same two events, in nats. Any shape."""
    log_mu, log_pi = (x.clamp(min=_MIN_LOG_PROB) for x in (log_mu, log_pi))
    mu_other, pi_other = (-torch.expm1(x) for x in (log_mu, log_pi))
    return (log_mu.exp() * (log_mu - log_pi) + _kl_term(mu_other, pi_other)).clamp(min=0)


def top_tv(
    log_mu: torch.Tensor, log_pi: torch.Tensor, top_log_mu: torch.Tensor, top_log_pi: torch.Tensor
) -> torch.Tensor:
    """
    Total variation between the events "this token", "that one" for K others, and "the rest".

    Args:
        log_mu, log_pi (`(...)`): Of the sampled token.
        top_log_mu, top_log_pi (`(..., K)`): Of other tokens, `-inf` in `top_log_mu` where there is none.
    """
    mu, pi, mu_rest, pi_rest = _events(log_mu, log_pi, top_log_mu, top_log_pi)
    return ((mu - pi).abs().sum(-1) + (mu_rest - pi_rest).abs()) / 2


def top_kl(
    log_mu: torch.Tensor, log_pi: torch.Tensor, top_log_mu: torch.Tensor, top_log_pi: torch.Tensor
) -> torch.Tensor:
    """`KL(mu || pi)` between the same events, in nats. Arguments as for [`top_tv`]."""
    mu, _, mu_rest, pi_rest = _events(log_mu, log_pi, top_log_mu, top_log_pi)
    log_mu = torch.cat([log_mu.unsqueeze(-1), top_log_mu], -1).clamp(min=_MIN_LOG_PROB)
    log_pi = torch.cat([log_pi.unsqueeze(-1), top_log_pi], -1).clamp(min=_MIN_LOG_PROB)
    return ((mu * (log_mu - log_pi)).sum(-1) + _kl_term(mu_rest, pi_rest)).clamp(min=0)


def _events(
    log_mu: torch.Tensor, log_pi: torch.Tensor, top_log_mu: torch.Tensor, top_log_pi: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Probabilities of the tokens, `(..., 1 + K)`, and of the rest, for mu and for pi."""
    top_log_pi = top_log_pi.masked_fill(top_log_mu.isneginf(), -torch.inf)
    mu, pi = (
        torch.cat([own.exp().unsqueeze(-1), top.exp()], -1)
        for own, top in ((log_mu, top_log_mu), (log_pi, top_log_pi))
    )
    mu_rest, pi_rest = (
        (-torch.expm1(own) - top.exp().sum(-1)).clamp(min=0)
        for own, top in ((log_mu, top_log_mu), (log_pi, top_log_pi))
    )
    return mu, pi, mu_rest, pi_rest


def _kl_term(mu: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    return mu * (mu.clamp(min=_MIN_COMPLEMENT).log() - pi.clamp(min=_MIN_COMPLEMENT).log())
