"""One device, and DDP, which averages gradients over ranks only at the end of an accumulation."""

from collections.abc import Iterator

import torch
from torch import nn


class Backend:
    """
    Says which tensors autograd computes gradients for, which parameters these tensors stand for, and what this rank
    has accumulated. This class is for a single device and for DDP.

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
        """The tensors that autograd computes gradients for, after a forward pass, with their names."""
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def owner(self, leaf: nn.Parameter) -> nn.Parameter:
        """The parameter that a leaf stands for. Several leaves can stand for one."""
        return leaf

    def accumulated(self, param: nn.Parameter) -> torch.Tensor | None:
        """What has been accumulated for a parameter, in its whole shape, or `None`."""
        return param.grad

    def check_leaf_gradient(self, name: str, grad: torch.Tensor) -> None:
        """
        Check the gradient that autograd computed for a leaf.

        Raises:
            RuntimeError: If it is not that of a whole parameter.
        """
