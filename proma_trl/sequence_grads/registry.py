"""Which layers yield sequence gradients, and how: a registry that users can extend."""

from collections.abc import Callable

import torch
from torch import nn

from .factored import SequenceGrads
from .probe import agree, noise, probe, runs_as

Rule = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], dict[str, "torch.Tensor | SequenceGrads"]]

_RULES: dict[type[nn.Module], Rule] = {}


def register_rule(*module_classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """
    Register how the modules of a class yield the gradients of each sequence of a microbatch.

    The decorated function is called in the backward pass as `rule(module, inputs, grad_output)`:

    - `module`: the module that ran;
    - `inputs`: its tensor arguments (positional ones first), detached, `(k, ...)` with one entry a sequence;
    - `grad_output`: the gradient of its output, `(k, ...)`.

    It returns, for every parameter that the module itself holds, `{parameter name: gradients}` with gradients of shape
    `(k, *parameter.shape)`: entry i is what sequence i alone contributes. A module's output must be one tensor, and
    outputs of a sequence must depend on that sequence's inputs only. A subclass inherits the rule if it inherits
    `forward`.

    Args:
        module_classes (`type[nn.Module]`): The classes that the rule is for.

    Example:

    ```python
    @register_rule(LayerScale)  # y = gamma * x
    def layer_scale(module, inputs, grad_output):
        return {"gamma": (grad_output * inputs[0]).flatten(1, -2).sum(1)}
    ```
    """

    def register(rule: Rule) -> Rule:
        for module_class in module_classes:
            _RULES[module_class] = rule
        return rule

    return register


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module, or `None`: the one of its class, or of a base class whose computation it inherits."""
    for base in type(module).__mro__:
        rule = _RULES.get(base)
        if rule is not None:
            if runs_as(module) is base.forward or _holds(rule, module):
                return rule
            return None
    return None


def _holds(rule: Rule, module: nn.Module) -> bool:
    """Whether a base class's rule gives the right gradients for a subclass with a `forward` of its own, by trial."""
    try:
        module = probe(module)
        weight = module.weight
        params = {name: param for name, param in module.named_parameters(recurse=False) if param.requires_grad}
        features = getattr(module, "in_features", None)
        inputs = noise(2, 3, *(weight.shape if features is None else (features,)), like=weight)
        with torch.enable_grad():
            output = module(inputs)
        if not isinstance(output, torch.Tensor) or output.shape[:2] != inputs.shape[:2]:
            return False
        grad_output = noise(*output.shape, like=output)
        found = rule(module, (inputs,), grad_output)
        for i in range(2):
            mask = torch.zeros_like(grad_output)
            mask[i] = grad_output[i]
            expected = torch.autograd.grad(output, list(params.values()), mask, retain_graph=True)
            for (name, param), gradient in zip(params.items(), expected, strict=True):
                unit = torch.zeros(2, device=param.device)
                unit[i] = 1
                grads = found[name]
                ours = grads[i] if isinstance(grads, torch.Tensor) else grads.combine(unit).view_as(param)
                if not agree(ours, gradient):
                    return False
    except Exception:  # a trial: a module that cannot take this input is one that the rule is not for
        return False
    return True
