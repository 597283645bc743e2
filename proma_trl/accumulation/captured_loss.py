"""The loss of a captured microbatch, and what its graph says about where a gradient comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from ..torch_internals import function_of, without_torch_function

if TYPE_CHECKING:
    from .microbatch import Microbatch

_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)
_PACKAGE = __name__.partition(".")[0]


class StartBackward(torch.autograd.Function):
    """The loss of a microbatch: its value is the true one, its backward pass starts every sequence with its weight."""

    @staticmethod
    def forward(
        ctx,
        objective: torch.Tensor,
        value: torch.Tensor,
        microbatch: Microbatch,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.microbatch, ctx.shape, ctx.weights = microbatch, objective.shape, weights
        return value.to(objective.dtype).clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        ctx.microbatch.begin_backward(grad_output, ctx)
        grad = grad_output.expand(ctx.shape)
        return (grad if ctx.weights is None else grad * ctx.weights.to(grad)), None, None, None


class CapturedLoss(torch.Tensor):
    """
    What `accumulation.loss` returns, and every loss that is computed from it. It is an ordinary tensor, but for its
    `backward`, which first checks that parameters get gradients through captured objectives alone: a term that is
    added to the loss belongs to no sequence, and in a parameter's gradient it can't be separated any more.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with without_torch_function():
            if func in _BACKWARD:
                _check_terms(args[0])
            result = func(*args, **(kwargs or {}))
            is_loss = isinstance(result, torch.Tensor) and result.requires_grad and not isinstance(result, cls)
            return result.as_subclass(cls) if is_loss else result

    def __format__(self, format_spec: str) -> str:
        return format(self.detach(), format_spec)  # torch formats the numbers of no subclass


def foreign_uses(start: Any, leaf: torch.Tensor) -> list[str] | None:
    """
    Which operations within a captured objective, other than those of followed layers, give a leaf a gradient.

    Args:
        start: The node of [`StartBackward`] that the objective is behind.
        leaf (`torch.Tensor`): The leaf.

    Returns:
        `list[str]` or `None`: The names of their nodes. `None` if it can't be known: reentrant checkpointing hides
        what ran within it.
    """
    found, hides = [], False
    for node in _nodes([following for following, _ in start.next_functions]):
        hides |= function_of(node) is CheckpointFunction
        if any(getattr(following, "variable", None) is leaf for following, _ in node.next_functions):
            function = function_of(node)
            if function is None or function.__module__.partition(".")[0] != _PACKAGE:
                found.append(node.name())
    return None if hides and not found else found


def outside_term(shown: str) -> RuntimeError:
    """The error about a term in the loss that has a gradient for the parameters `shown`."""
    return RuntimeError(
        f"The loss holds a term outside the captured objective, with a gradient for {shown}. Such a gradient belongs "
        "to no sequence: the update rule would take it for policy gradient. Leave the term out of the loss. A loop "
        "can send it backward by itself after the last microbatch of a step, which accumulates it as it is; in a "
        'trainer, use `GRPOTrainer`, or REINFORCE (`projection="none"`), which take such terms.'
    )


def _check_terms(roots: Any) -> None:
    """
    Check that what is sent backward leads to parameters through captured objectives alone.

    Raises:
        RuntimeError: If a term leads to one around them, with the parameter's name.
    """
    roots = [roots] if isinstance(roots, torch.Tensor) else roots
    microbatches, variables, hides = set(), [], False
    for node in _nodes([root.grad_fn for root in roots if isinstance(root, torch.Tensor)]):
        function = function_of(node)
        if function is StartBackward:
            microbatches.add(node.microbatch)
        hides |= function is CheckpointFunction
        if hasattr(node, "variable"):
            variables.append(node.variable)
    if not (variables or hides):
        return
    names: dict[nn.Parameter, str] = {}
    for microbatch in microbatches:
        names.update((leaf, name) for name, leaf in microbatch.engine.backend.leaves())
    reached = [f"`{names[variable]}`" for variable in variables if variable in names]
    if reached:
        more = f" and {len(reached) - 3} more parameters" if reached[3:] else ""
        raise outside_term(", ".join(reached[:3]) + more)
    if hides:
        raise outside_term("what a checkpointed layer holds")


def _nodes(starts: list[Any]) -> Iterator[Any]:
    """The nodes of a graph, each once, without those behind [`StartBackward`]."""
    seen, stack = set(), list(starts)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if function_of(node) is not StartBackward:
            stack += [following for following, _ in node.next_functions]
