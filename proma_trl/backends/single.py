"""One device, and DDP, which averages gradients over ranks at the end of an accumulation only."""

from collections.abc import Iterator

import torch
from torch import nn


class Backend:
    """
    Where gradients lie: the tensors for which autograd makes gradients, the parameters that they belong to, and what
    has been accumulated for these on this rank. This one is for a single device and for DDP.

    Args:
        model (`nn.Module`): The model, as `accelerator.prepare` left it.

    Attributes:
        keeps_accumulated (`bool`): Whether [`accumulated`] can be read until the optimizer step.
        reduces_in_backward (`bool`): Whether gradients are averaged over ranks, and taken from `param.grad`, within a
            backward pass.
    """

    keeps_accumulated = True
    reduces_in_backward = False

    def __init__(self, model: nn.Module):
        self.model = model

    def leaves(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors that autograd makes gradients for, as they are after a forward pass, with their names."""
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def owner(self, leaf: nn.Parameter) -> nn.Parameter:
        """The parameter that a leaf, or several of them, stand for."""
        return leaf

    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        """What has been accumulated for a parameter, in its whole shape, or `None`."""
        return param.grad

    def check_leaf_gradient(self, name: str, grad: torch.Tensor) -> None:
        """
        Check the gradient that autograd made for a leaf.

        Raises:
            RuntimeError: If it is not that of a whole parameter.
        """
