"""Normalization layers.

PyTorch's own have a rule. Those of transformers (`weight`, `1 + weight`, biases, per-head ones) need none: they
multiply by their parameters, so that a parameter expanded to one copy a sequence broadcasts against `(k, T, ...)`, and
autograd computes each sequence's gradient in its copy. A trial on noise decides whether a class is of this kind.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .forms import Dense, sum_dtype
from .layer import Layer, Sink, by_sequence, is_by_sequence
from .probe import agree, noise, probe
from .registry import register_rule


@register_rule(nn.LayerNorm)
def layer_norm(
    module: nn.LayerNorm, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`y = w * (x - mean) / sd + b`."""
    dtype = sum_dtype(grad_output)
    values, grad_output = inputs[0].to(dtype), grad_output.to(dtype)
    normalized = F.layer_norm(values, module.normalized_shape, eps=module.eps)
    grads = {"weight": _sum_tokens(grad_output * normalized, module.weight)}
    if module.bias is not None:
        grads["bias"] = _sum_tokens(grad_output, module.bias)
    return grads


@register_rule(nn.RMSNorm)
def rms_norm(
    module: nn.RMSNorm, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`y = w * x / rms(x)`."""
    dtype = sum_dtype(grad_output)
    # Without a value of its own, the layer's epsilon is that of its input's dtype
    eps = module.eps if module.eps is not None else torch.finfo(inputs[0].dtype).eps
    normalized = F.rms_norm(inputs[0].to(dtype), module.normalized_shape, eps=eps)
    return {"weight": _sum_tokens(grad_output.to(dtype) * normalized, module.weight)}


def broadcasts_parameters(module: nn.Module) -> bool:
    """
    Whether a normalization module takes one copy of its parameters a sequence, `(k, 1, ..., *shape)`, and then treats
    each sequence as a module with that copy would.
    """
    if "norm" not in type(module).__name__.lower():
        return False
    try:
        module = probe(module)
        params = dict(module.named_parameters(recurse=False))
        (shape,) = {param.shape for param in params.values()}
        like = next(iter(params.values()))
        with torch.no_grad():
            for leading in ((2, 3), (2, 3, 4)):
                inputs = noise(*leading, *shape, like=like)
                copies = {
                    name: param + noise(2, *([1] * (len(leading) - 1)), *shape, like=param)
                    for name, param in params.items()
                }
                together = functional_call(module, copies, (inputs,))
                for i in range(2):
                    alone = functional_call(
                        module, {name: copy[i].view(shape) for name, copy in copies.items()}, (inputs[i : i + 1],)
                    )
                    if together.shape != inputs.shape or not agree(together[i : i + 1], alone):
                        return False
    except Exception:  # a trial: a module that cannot take such parameters is one that this is not for
        return False
    return True


def _sum_tokens(values: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """`(k, ..., *param.shape)` summed to `(k, *param.shape)`."""
    return values.reshape(values.shape[0], -1, *param.shape).sum(1)


class BroadcastLayer(Layer):
    """A normalization layer: runs on one copy of its parameters a sequence."""

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        values = args[0] if args else next(iter(kwargs.values()))
        if sink.num_sequences and not is_by_sequence(sink, values):
            return None  # an error where a gradient arrives, as nothing is wrong with one that gets none
        per_sequence = by_sequence(sink, values, self.name)
        self.like = values if sink.rows is not None else None
        self.flattened = per_sequence.dim() != values.dim()
        if args:
            args = (per_sequence, *args[1:])
        else:
            kwargs = {**kwargs, next(iter(kwargs)): per_sequence}
        self.entered = True
        for name, param in self.params.items():
            self.module.__dict__[name] = _Copies.apply(param, per_sequence.dim(), sink)
        return args, kwargs

    def exit(self) -> None:
        for name in self.param_names:
            self.module.__dict__.pop(name, None)
        self.entered = False

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        like, self.like = self.like, None
        if like is not None:
            return sink.rows.together(output, like)
        return output.flatten(0, 1) if self.flattened else None


class _Copies(torch.autograd.Function):
    """One copy of a parameter a sequence, `(k, 1, ..., *shape)`; backward, hands their gradients over."""

    @staticmethod
    def forward(ctx, param, dim, sink):
        ctx.param, ctx.sink = param, sink
        k = sink.num_sequences
        return param.detach().view(*([1] * (dim - param.dim())), *param.shape).repeat(k, *([1] * (dim - 1)))

    @staticmethod
    def backward(ctx, grad_output):
        param = ctx.param
        grads = grad_output.reshape(len(grad_output), *(param.shape or (1,)))
        return ctx.sink.receive(param, Dense(grads)), None, None
