"""Convolutions: PyTorch's `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, as mixers and patch embeddings run them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .forms import sum_dtype
from .registry import register_rule

_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    `y = w * x + b`. Inputs are `(k, channels, *space)`, or, of layers on images, `(k, R, channels, *space)`.

    A patch embedding, whose kernels lie side by side, multiplies patches by a matrix, which is one product for all
    sequences. Other convolutions take one kernel a sequence.
    """
    dtype = sum_dtype(grad_output)
    values, grad_output = inputs[0].to(dtype), grad_output.to(dtype)
    space = module.weight.dim() - 2
    if values.dim() == space + 2:
        values, grad_output = values.unsqueeze(1), grad_output.unsqueeze(1)
    grads = {}
    if module.weight.requires_grad:
        by_patches = _has_patches(module, values)
        grads["weight"] = (_of_patches if by_patches else _one_by_one)(module, values, grad_output)
    if module.bias is not None and module.bias.requires_grad:
        grads["bias"] = grad_output.flatten(3).sum((1, 3))
    return grads


def _has_patches(module: nn.Module, values: torch.Tensor) -> bool:
    """Whether kernels lie side by side and cover the inputs."""
    fits = all(size % kernel == 0 for size, kernel in zip(values.shape[3:], module.kernel_size, strict=True))
    plain = module.groups == 1 and not any(_padding(module)) and set(module.dilation) == {1}
    return plain and module.stride == module.kernel_size and fits


def _of_patches(module: nn.Module, values: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """From inputs `(k, R, channels, *space)` and gradients `(k, R, out, *patches)`."""
    k, rows, channels = values.shape[:3]
    counts = [size // kernel for size, kernel in zip(values.shape[3:], module.kernel_size, strict=True)]
    sizes = [n for pair in zip(counts, module.kernel_size, strict=True) for n in pair]
    patches = values.reshape(k, rows, channels, *sizes)
    order = [*range(3, patches.dim(), 2), 2, *range(4, patches.dim(), 2)]
    patches = patches.permute(0, 1, *order).reshape(k, -1, module.weight[0].numel())
    grads = grad_output.flatten(3).mT.reshape(k, patches.shape[1], -1)
    return (grads.mT @ patches).view(k, *module.weight.shape)


def _one_by_one(module: nn.Module, values: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """From inputs `(k, R, channels, *space)` and gradients `(k, R, out, *space')`."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    gradient, shape = _GRADIENTS[module.weight.dim() - 2], module.weight.shape
    how = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    pairs = zip(values, grad_output, strict=True)
    return torch.stack([gradient(F.pad(x, _padding(module), mode=mode), shape, g, **how) for x, g in pairs])


def _padding(module: nn.Module) -> list[int]:
    """What is added at the beginning and at the end of each dimension, the last one first, as `F.pad` takes it."""
    return list(module._reversed_padding_repeated_twice)
