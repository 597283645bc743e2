"""Embeddings: `nn.Embedding` and its subclasses (scaled ones, positions with an offset).

A subclass computes around the lookup, so what is intercepted is the lookup itself, wherever in `forward` it happens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .factored import Rows


class LookupMode(TorchFunctionMode):
    """
    While active, hands the lookups in `weight` to `lookup(ids, weight, padding_idx)`.

    Args:
        weight (`nn.Parameter`): The embedding's weight.
        lookup (`Callable`): What to do instead of `torch.nn.functional.embedding`.
    """

    def __init__(self, weight: nn.Parameter, lookup: Callable[[torch.Tensor, torch.Tensor, int | None], torch.Tensor]):
        super().__init__()
        self.weight = weight
        self.lookup = lookup

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding:
            ids, weight, padding_idx = _embedding_arguments(*args, **kwargs)
            if weight is self.weight:
                return self.lookup(ids, weight, padding_idx)
        elif func is torch.Tensor.__getitem__ and args[0] is self.weight:
            # Whisper's positions: rows picked by their index
            rows = torch.arange(len(self.weight), device=self.weight.device)[args[1]]
            return self.lookup(rows, self.weight, None)
        return func(*args, **kwargs)


def _embedding_arguments(input, weight, padding_idx=None, *_, **__):  # named as in torch
    return input, weight, padding_idx


def embedding_refusal(module: nn.Embedding) -> str | None:
    """Why an embedding cannot be trained, or `None`."""
    if module.sparse:
        return "its gradients are sparse (`sparse=True`)"
    if module.max_norm is not None:
        return "it rescales its weight in the forward pass (`max_norm`)"
    if module.scale_grad_by_freq:
        return "it scales gradients by how often a token occurs in the whole microbatch (`scale_grad_by_freq=True`)"
    return None


def embedding_grads(
    ids: torch.Tensor, padding_idx: int | None, num_embeddings: int, grad_output: torch.Tensor
) -> Rows:
    """
    Args:
        ids (`(k, ...)`): Rows that were looked up.
        padding_idx (`int` or `None`): Row that receives no gradient.
        num_embeddings (`int`): Number of rows of the weight.
        grad_output (`(k, ..., H)`): Gradient of what was read.
    """
    ids = ids.reshape(ids.shape[0], -1)
    values = grad_output.reshape(*ids.shape, -1)
    if padding_idx is not None:
        values = values.masked_fill((ids == padding_idx % num_embeddings).unsqueeze(-1), 0)
    return Rows(ids, values, num_embeddings)
