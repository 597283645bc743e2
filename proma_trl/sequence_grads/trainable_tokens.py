"""PEFT's `trainable_token_indices`: an embedding, or the head tied to it, of which a few rows are trained."""

import sys

import torch
from torch import nn

from .forms import Dense, SequenceGrads, sum_dtype
from .layer import Layer, Sink, by_sequence
from .registry import RuleLayer


def is_trainable_tokens(module: nn.Module) -> bool:
    """Whether a module is PEFT's `TrainableTokensLayer`."""
    peft_layers = sys.modules.get("peft.tuners.trainable_tokens.layer")
    return peft_layers is not None and isinstance(module, peft_layers.TrainableTokensLayer)


class TrainableTokensRule(RuleLayer):
    """
    Some rows of a weight `(V, H)`. Of a sequence's gradient of the whole weight, only these rows are formed:
    `(k, n, H)` for n trained tokens.
    """

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        Layer.__init__(self, name, module, param_names)

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module.base_layer, nn.Embedding):  # one number a token, as other layers have H
            args = (args[0].unsqueeze(-1), *args[1:])
        return super().leave(sink, args[:1], {}, output)

    def grads(
        self,
        sink: Sink,
        params: dict[str, nn.Parameter],
        inputs: tuple[torch.Tensor, ...],
        grad_output: torch.Tensor,
    ) -> dict[str, SequenceGrads]:
        values, grads = (by_sequence(sink, x, self.name) for x in (inputs[0], grad_output))
        values, grads = (x.flatten(1, -2) for x in (values, grads))
        with torch.no_grad(), torch.autocast(grads.device.type, enabled=False):
            return {name: Dense(self._rows(name, param, values, grads), owned=True) for name, param in params.items()}

    def _rows(self, name: str, param: nn.Parameter, values: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        """From inputs and output gradients, `(k, N, ...)`."""
        adapter, dtype = name.rpartition(".")[2], sum_dtype(grads)
        if adapter not in self.module.active_adapters:
            return grads.new_zeros((len(grads), *param.shape), dtype=dtype)
        rows = torch.tensor(self.module.token_indices[adapter], device=grads.device)
        if not isinstance(self.module.base_layer, nn.Embedding):
            return grads[..., rows].mT.to(dtype) @ values.to(dtype)
        scale = self.module._get_embed_scale()
        reads = values.squeeze(-1).unsqueeze(1) == rows.unsqueeze(1)
        padding = self.module.base_layer.padding_idx
        if padding is not None:
            reads &= (rows != padding).unsqueeze(1)
        return reads.to(dtype) @ (grads if scale is None else grads * scale.to(grads.dtype)).to(dtype)
