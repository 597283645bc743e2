"""Experts of mixtures, as transformers has them: one module with a 3-D parameter for each of their two linear maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..backends import whole_shape
from .forms import sum_dtype
from .layer import Layer, Sink, alias

# Elements of the largest matrix of the experts that are worked on at a time (256 MiB in float32)
_BATCH_ELEMENTS = 2**26


@dataclass(frozen=True)
class ExpertFactors:
    """
    Inputs and output gradients of b experts, those from place `first` on, in one of their linear maps. Each expert has
    the tokens that were routed to it, filled up to R.

    Attributes:
        first (`int`): Place of the first expert.
        inputs (`(b, R, d_in)`), grads (`(b, R, d_out)`): Zero where filled up.
        rows (`(b, R)`): Which of the k * T tokens each row is of.
        used (`(b, R)`): Whether it is of any.
        num_tokens (`int`): T.
        transposed (`bool`): Whether the parameter is `(experts, d_in, d_out)` instead of `(experts, d_out, d_in)`.
    """

    first: int
    inputs: torch.Tensor
    grads: torch.Tensor
    rows: torch.Tensor
    used: torch.Tensor
    num_tokens: int
    transposed: bool


class ExpertSink(Sink, Protocol):
    """A [`Sink`] that wants to know what experts were given."""

    def receive_experts(self, param: nn.Parameter, experts: ExpertFactors) -> None:
        """Take the factors of some experts' gradients."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a mixture's experts, as transformers' `use_experts_implementation` describes them."""
    names = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    if not all(hasattr(module, name) for name in names):
        return False
    weights = [getattr(module, name, None) for name in _weight_names(module)]
    return all(isinstance(weight, nn.Parameter) and len(whole_shape(weight)) == 3 for weight in weights)


def _weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


class ExpertsLayer(Layer):
    """
    A mixture's experts. Autograd computes the gradients of their parameters as it always does; in the backward pass,
    the experts run again on their inputs, which gives the inputs and output gradients of both linear maps.
    """

    def __init__(self, name: str, module: nn.Module):
        super().__init__(name, module, ())

    @property
    def matrices(self) -> list[nn.Parameter]:
        weights = (getattr(self.module, name) for name in _weight_names(self.module))
        return [weight for weight in weights if weight.requires_grad]

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True

    def exit(self) -> None:
        self.entered = False

    def tells_sequences(self, sink: Sink, args: tuple, kwargs: dict) -> bool:
        hidden, *_ = self._arguments(args, kwargs)
        tokens = hidden.shape[:-1].numel()
        return sink.num_tokens is not None and tokens == sink.num_sequences * sink.num_tokens

    def leave(self, sink: ExpertSink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        return _ExpertsOutput.apply(output, self, sink, *(x.detach() for x in self._arguments(args, kwargs)))

    def factors(
        self, sink: ExpertSink, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor, grad: torch.Tensor
    ) -> Iterator[tuple[nn.Parameter, ExpertFactors]]:
        """
        Args:
            hidden (`(k * T, d)`): What the experts are given.
            index (`(k * T, m)`), routing (`(k * T, m)`): The experts of each token, and their weights.
            grad (`(k * T, d)`): Gradient of the module's output.
        """
        module, dtype = self.module, sum_dtype(grad)
        up_name, down_name = _weight_names(module)
        chosen = index.shape[-1]
        order = index.flatten().argsort(stable=True)
        counts = index.flatten().bincount(minlength=module.num_experts)[: module.num_experts].tolist()
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        longest = max(counts, default=0)
        if longest == 0:
            return
        width = max(getattr(module, name).shape[dim] for name in (up_name, down_name) for dim in (1, 2))
        step = max(1, _BATCH_ELEMENTS // (longest * width))
        places = torch.arange(longest, device=hidden.device)
        for first in range(0, module.num_experts, step):
            some = slice(first, min(first + step, module.num_experts))
            begin = torch.tensor(starts[some], device=hidden.device).unsqueeze(1)
            used = places < torch.tensor(counts[some], device=hidden.device).unsqueeze(1)
            picked = order[torch.where(used, begin + places, 0)]
            rows, kept = picked // chosen, used.unsqueeze(-1)
            inputs = hidden[rows].to(dtype) * kept
            grads = grad[rows].to(dtype) * routing.flatten()[picked].unsqueeze(-1).to(dtype) * kept
            with torch.enable_grad():
                up = _linear(module, up_name, some, inputs).requires_grad_()
                between = module._apply_gate(up) if module.has_gate else module.act_fn(up)
                down = _linear(module, down_name, some, between)
                output = module.post_expert_norm(down) if module.has_post_expert_norm else down
                of_up, of_down = torch.autograd.grad(output, (up, down), grads)
            for name, given, gradient in ((up_name, inputs, of_up), (down_name, between.detach() * kept, of_down)):
                weight = getattr(module, name)
                if weight.requires_grad:
                    yield (
                        weight,
                        ExpertFactors(first, given, gradient, rows, used, sink.num_tokens, module.is_transposed),
                    )

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = (*args, *kwargs.values())
        return values[0], values[1], values[2]


def _linear(module: nn.Module, name: str, experts: slice, inputs: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name).detach()[experts].to(inputs.dtype)
    output = inputs @ (weight if module.is_transposed else weight.mT)
    if module.has_bias:
        output = output + getattr(module, f"{name}_bias").detach()[experts].to(inputs.dtype).unsqueeze(1)
    return output


class _ExpertsOutput(torch.autograd.Function):
    """Passes the experts' output on; backward, finds the factors of their gradients before autograd forms these."""

    @staticmethod
    def forward(ctx, output, layer, sink, *tensors):
        ctx.layer, ctx.sink = layer, sink
        ctx.save_for_backward(*tensors)
        return alias(output)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, index, routing = (x.reshape(-1, x.shape[-1]) for x in ctx.saved_tensors)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for param, experts in ctx.layer.factors(ctx.sink, hidden, index, routing, grad):
                ctx.sink.receive_experts(param, experts)
        return grad_output, None, None, None, None, None
