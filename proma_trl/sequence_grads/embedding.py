"""Embeddings: `nn.Embedding` and its subclasses (scaled ones, positions with an offset).

A subclass computes around the lookup, so what is intercepted is the lookup itself, wherever in `forward` it happens.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .forms import Rows
from .layer import Layer, Sink, alias, by_sequence


class _LookupMode(TorchFunctionMode):
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


def _embedding_grads(
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


class EmbeddingLayer(Layer):
    """An embedding: its lookups, wherever its forward makes them, run on the detached weight."""

    def tells_sequences(self, sink: Sink, args: tuple, kwargs: dict) -> bool:
        return True  # judged at the lookup, which may be of other indices

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True
        self.mode = _LookupMode(self.module.weight, partial(self.lookup, sink))
        self.mode.__enter__()

    def exit(self) -> None:
        self.mode.__exit__(None, None, None)
        self.mode = None
        self.entered = False

    def lookup(self, sink: Sink, ids: torch.Tensor, weight: nn.Parameter, padding_idx: int | None) -> torch.Tensor:
        if sink.rows is None:
            ids = self.per_sequence(sink, ids)
        output = F.embedding(ids, weight.detach(), padding_idx)
        return _Lookup.apply(output, ids, padding_idx, sink, weight, self.name)

    def per_sequence(self, sink: Sink, ids: torch.Tensor) -> torch.Tensor:
        k, length = sink.num_sequences, sink.num_tokens
        if ids.dim() >= 2 and ids.shape[0] == k and (length is None or ids.shape[1] == length):
            return ids
        # Positions come once for all sequences
        if length is not None and ids.shape in ((length,), (1, length)):
            return ids.expand(k, -1)
        if length is None and ids.dim() == 1 and len(ids) == k:
            return ids
        return by_sequence(sink, ids.unsqueeze(-1), self.name).squeeze(-1)


class _Lookup(torch.autograd.Function):
    """Passes what was looked up on; backward, hands the embedding's sequence gradients over."""

    @staticmethod
    def forward(ctx, output, ids, padding_idx, sink, weight, name):
        ctx.name, ctx.padding_idx, ctx.sink, ctx.weight, ctx.num_rows = name, padding_idx, sink, weight, len(weight)
        ctx.save_for_backward(ids)
        return alias(output)

    @staticmethod
    def backward(ctx, grad_output):
        (ids,) = ctx.saved_tensors
        if ctx.sink.rows is not None:
            ids, grad_output = (ctx.sink.rows.by_sequence(x, ctx.name) for x in (ids, grad_output))
        grads = _embedding_grads(ids, ctx.padding_idx, ctx.num_rows, grad_output)
        return None, None, None, None, ctx.sink.receive(ctx.weight, grads), None
