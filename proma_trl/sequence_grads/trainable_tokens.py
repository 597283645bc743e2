"""PEFT's `trainable_token_indices`: an embedding, or the head tied to it, of which a few rows are trained."""

import sys

import torch
from torch import nn

from .forms import sum_dtype
from .layer import Sink
from .registry import RuleLayer


def is_trainable_tokens(module: nn.Module) -> bool:
    """Whether a module is PEFT's `TrainableTokensLayer`."""
    peft_layers = sys.modules.get("peft.tuners.trainable_tokens.layer")
    return peft_layers is not None and isinstance(module, peft_layers.TrainableTokensLayer)


class TrainableTokensRule(RuleLayer):
    """Some rows of a weight: the module's parameters are in its `trainable_tokens_delta`, one for each adapter."""

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        super().__init__(name, module, param_names, _trained_rows)

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module.base_layer, nn.Embedding):  # one number a token, as other layers have H
            args = (args[0].unsqueeze(-1), *args[1:])
        return super().leave(sink, args[:1], {}, output)


def _trained_rows(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of a sequence's gradient of the whole weight `(V, H)`, only the trained rows, `(k, n, H)` for n tokens."""
    values, grads = (x.flatten(1, -2) for x in (inputs[0], grad_output))
    found = {}
    for adapter, param in module.trainable_tokens_delta.items():
        acts = adapter in module.active_adapters
        rows = _rows(module, adapter, values, grads) if acts else grads.new_zeros((len(grads), *param.shape))
        found[f"trainable_tokens_delta.{adapter}"] = rows
    return found


def _rows(module: nn.Module, adapter: str, values: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """From inputs and output gradients, `(k, N, ...)`."""
    dtype = sum_dtype(grads)
    rows = torch.tensor(module.token_indices[adapter], device=grads.device)
    if not isinstance(module.base_layer, nn.Embedding):
        return grads[..., rows].mT.to(dtype) @ values.to(dtype)
    scale = module._get_embed_scale()
    reads = values.squeeze(-1).unsqueeze(1) == rows.unsqueeze(1)
    padding = module.base_layer.padding_idx
    if padding is not None:
        reads &= (rows != padding).unsqueeze(1)
    return reads.to(dtype) @ (grads if scale is None else grads * scale.to(grads.dtype)).to(dtype)
