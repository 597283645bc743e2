"""Log-probabilities of a few given tokens at each position, from TRL's fused LM head, whose logits are never held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import pad

from ..sequence_grads.layer import autocast_dtype
from .trl_internals import head_is_compact, observed_head

# Elements of rows of the head's weight that are gathered at a time: 32 MiB in float32
_TILE_ELEMENTS = 2**23


@contextmanager
def top_log_probs(ids: torch.Tensor, mask: torch.Tensor, num_run: int) -> Iterator[list[torch.Tensor]]:
    """
    Within the context, each forward pass of TRL's fused head adds to the list that is yielded the policy's
    log-probabilities of `ids`: `(k, T, K)`, without gradients.

    Args:
        ids (`(k, T, K)`): Tokens at each of the T last positions; what is negative is none, and gets any value.
        mask (`(k, T)`, bool): Positions of real tokens.
        num_run (`int`): How many of the T positions the model runs on, the first ones. Others get zeros.
    """
    found: list[torch.Tensor] = []

    @torch.no_grad()
    def read(outputs, hidden, weight, bias, targets, temperature, _, softcap, logit_scale, *settings) -> None:
        log_probs, own = outputs[0], ids.to(hidden.device).long().clamp(min=0)
        compact = head_is_compact(hidden.device)
        if compact:
            own = own[mask]
        else:
            # The sequences' positions but for the last token's, of which the prompts' are not scored
            own = own[:, :num_run]
            hidden, targets, log_probs = (
                x.unflatten(0, (len(mask), -1))[:, -num_run:] for x in (hidden, targets, log_probs)
            )
        own = torch.cat([targets.unsqueeze(-1), own], -1)
        logits = _logits(hidden.flatten(0, -2), weight, bias, own.flatten(0, -2)).mul_(logit_scale)
        if softcap is not None:
            logits = (logits / softcap).tanh_().mul_(softcap)
        logits = logits.div_(temperature).view(own.shape)
        values = log_probs.unsqueeze(-1) + logits[..., 1:] - logits[..., :1]
        if compact:
            values = values.new_zeros((*mask.shape, values.shape[-1])).masked_scatter(mask.unsqueeze(-1), values)
        found.append(pad(values, (0, 0, 0, mask.shape[1] - values.shape[1])))

    with observed_head(read):
        yield found


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """Products of N hidden states `(N, H)` with the head's rows `ids`, `(N, m)`, in the head's own precision."""
    dtype = autocast_dtype(hidden.device) or hidden.dtype
    parts = []
    for states, rows in zip(
        hidden.split(step := max(1, _TILE_ELEMENTS // (ids.shape[-1] * hidden.shape[-1]))),
        ids.split(step),
        strict=True,
    ):
        part = (weight[rows].to(dtype) @ states.to(dtype).unsqueeze(-1)).squeeze(-1)
        parts.append(part if bias is None else part + bias[rows].to(dtype))
    return torch.cat(parts).float()
