"""Layers that multiply by a matrix: `nn.Linear` and transformers' `Conv1D`."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .forms import OuterProducts, SequenceGrads, sum_dtype
from .registry import Rule, register_rule, rule_for


@register_rule(nn.Linear)
def linear(
    module: nn.Linear, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor | SequenceGrads]:
    """`y = x W^T + b`, so that `dW = sum_t g_t x_t^T` and `db = sum_t g_t`."""
    grad_output, values = _tokens(grad_output), _tokens(inputs[0])
    return {"weight": OuterProducts(grad_output, values), "bias": _summed(module, grad_output)}


@register_rule(Conv1D)
def conv1d(
    module: Conv1D, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor | SequenceGrads]:
    """`y = x W + b`: a linear layer whose weight is stored transposed."""
    grad_output, values = _tokens(grad_output), _tokens(inputs[0])
    return {"weight": OuterProducts(values, grad_output, inputs="left"), "bias": _summed(module, grad_output)}


def rule_if_linear(module: nn.Module) -> Rule | None:
    """The rule of a module that multiplies its input by its `weight`; `None` for other modules."""
    rule = rule_for(module) if isinstance(module, nn.Linear | Conv1D) else None
    return rule if rule in (linear, conv1d) else None


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _summed(module: nn.Module, grad_output: torch.Tensor) -> torch.Tensor | None:
    if module.bias is None or not module.bias.requires_grad:
        return None
    return grad_output.sum(1, dtype=sum_dtype(grad_output))
