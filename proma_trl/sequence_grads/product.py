"""
Modules that multiply by a matrix of their own on the way to something else: the routers of mixtures of experts.

What is intercepted is the product, wherever in `forward` it happens. A trial on noise decides whether a module is of
this kind.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..backends import whole_shape
from ..torch_internals import own_parameters
from .forms import OuterProducts, SequenceGrads, sum_dtype
from .layer import Sink
from .probe import noise, probe
from .registry import RuleLayer, as_multiplied, rule_output

_CASTS = (torch.Tensor.type, torch.Tensor.to, torch.Tensor.float)

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class _ProductMode(TorchFunctionMode):
    """
    While active, hands products with `weight`, also when it is cast first, to `product(input, weight, bias)`.

    Args:
        weight (`nn.Parameter`): The weight.
        product (`Callable`): What to do instead of `torch.nn.functional.linear`.
    """

    def __init__(self, weight: nn.Parameter, product: Product):
        super().__init__()
        self.weights = [weight]
        self.product = product

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            values, weight, bias = _linear_arguments(*args, **kwargs)
            if self._is_weight(weight):
                return self.product(values, weight, bias)
        result = func(*args, **kwargs)
        if func in _CASTS and self._is_weight(args[0]):
            self.weights.append(result)
        return result

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return any(tensor is weight for weight in self.weights)


def _linear_arguments(input, weight, bias=None):  # named as in torch
    return input, weight, bias


def multiplies_once(module: nn.Module) -> bool:
    """Whether all that a module does with its parameters is one product of its input with `weight`, plus `bias`."""
    params = own_parameters(module)
    shapes = {name: whole_shape(param) for name, param in params.items() if param is not None}
    if len(shapes.get("weight", ())) != 2 or not shapes.keys() <= {"weight", "bias"}:
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    uses = []

    def product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        uses.append((len(values), bias))
        return _product(values, weight, bias)

    try:
        module = probe(module)
        inputs = noise(6, shapes["weight"][1], like=module.weight).requires_grad_()
        with torch.enable_grad(), _ProductMode(module.weight, product):
            outputs = pytree.tree_leaves(module(inputs))
        made = [x.sum() for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        trained = [param.requires_grad_() for param in own_parameters(module).values() if param is not None]
        others = torch.autograd.grad(sum(made), trained, allow_unused=True)
    except Exception:  # a trial: a module that can't take this input is one that this is not for
        return False
    if len(uses) != 1 or any(grad is not None for grad in others):
        return False
    (rows, bias), own = uses[0], getattr(module, "bias", None)
    return rows == 6 and bias is own  # a bias that is cast or scaled first has another gradient


class ProductLayer(RuleLayer):
    """A module that multiplies once: its product runs on the detached weight, and a node behind it forms gradients."""

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        super().__init__(name, module, param_names, _rule)

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True
        # Not from `params`, which has no frozen weight beside a trained bias
        self.mode = _ProductMode(own_parameters(self.module)["weight"], partial(self.product, sink))
        self.mode.__enter__()

    def exit(self) -> None:
        self.mode.__exit__(None, None, None)
        self.mode = None
        self.entered = False

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: object) -> None:
        return None

    def product(
        self, sink: Sink, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        output = _product(values, weight, bias)
        return rule_output(self, sink, output, [as_multiplied(sink, values.detach(), output)])


def _product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(values, weight.detach(), None if bias is None else bias.detach())


def _rule(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], grad_output: torch.Tensor
) -> dict[str, torch.Tensor | SequenceGrads]:
    """As for a linear layer, in double precision where the weight is, even if the product was in single."""
    values, grads = (x.flatten(1, -2) for x in (inputs[0], grad_output))
    if module.weight.dtype == torch.float64:
        values, grads = values.double(), grads.double()
    return {"weight": OuterProducts(grads, values), "bias": grads.sum(1, dtype=sum_dtype(grads))}
