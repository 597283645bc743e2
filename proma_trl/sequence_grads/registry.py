"""Layers with a rule: a function from what went into a module, and the gradient of what came out, to the gradients of
its parameters for each sequence. The registry of these rules can be extended by users."""

from collections.abc import Callable

import torch
from torch import nn

from ..backends import whole_shape
from .forms import Dense, SequenceGrads
from .layer import Layer, Sink, alias, by_sequence
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


class RuleLayer(Layer):
    """A module with a rule: its parameters take no gradient while it runs; a node behind its output forms theirs."""

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...], rule: Rule):
        super().__init__(name, module, param_names)
        self.rule = rule

    @property
    def matrices(self) -> list[nn.Parameter]:
        weight = self.params.get("weight")
        return [weight] if weight is not None and len(whole_shape(weight)) == 2 else []

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True
        self.hide_params()

    def exit(self) -> None:
        self.show_params()
        self.entered = False

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"`{self.name}` has a rule, so its output must be one tensor, got {type(output)}.")
        inputs = [x.detach() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        inputs = [as_multiplied(sink, x, output) for x in inputs]
        return rule_output(self, sink, output, inputs)

    def grads(
        self,
        sink: Sink,
        params: dict[str, nn.Parameter],
        inputs: tuple[torch.Tensor, ...],
        grad_output: torch.Tensor,
    ) -> dict[str, SequenceGrads]:
        inputs = tuple(by_sequence(sink, x, self.name) for x in inputs)
        grad_output = by_sequence(sink, grad_output, self.name)
        with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
            found = self.rule(self.module, inputs, grad_output)
        grads = {}
        for name, param in params.items():
            value = found.get(name)
            if isinstance(value, torch.Tensor):
                expected = (sink.num_sequences, *param.shape)
                if value.shape != expected:
                    raise ValueError(
                        f"The rule for `{self.name}` ({type(self.module).__name__}) returned gradients of shape "
                        f"{tuple(value.shape)} for `{name}`; they must have shape {expected}, one a sequence."
                    )
                value = Dense(value.unsqueeze(1) if param.dim() == 0 else value)
            if value is None:
                raise ValueError(
                    f"The rule for `{self.name}` ({type(self.module).__name__}) returned no gradients for its "
                    f"trainable parameter `{name}`."
                )
            grads[name] = value
        return grads


def rule_output(layer: RuleLayer, sink: Sink, output: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """`output`, behind which a node forms the gradients of a layer's parameters, from detached `inputs`."""
    return _RuleOutput.apply(output, layer, sink, len(inputs), *inputs, *layer.params.values())


class _RuleOutput(torch.autograd.Function):
    """Passes a layer's output on; backward, hands its parameters' sequence gradients over."""

    @staticmethod
    def forward(ctx, output, layer, sink, num_inputs, *tensors):
        ctx.layer, ctx.sink, ctx.num_inputs = layer, sink, num_inputs
        ctx.params = dict(zip(layer.param_names, tensors[num_inputs:], strict=True))
        ctx.save_for_backward(*tensors[:num_inputs])
        return alias(output)

    @staticmethod
    def backward(ctx, grad_output):
        layer, sink = ctx.layer, ctx.sink
        grads = layer.grads(sink, ctx.params, ctx.saved_tensors, grad_output)
        emissions = [sink.receive(param, grads[name]) for name, param in ctx.params.items()]
        return grad_output, None, None, None, *([None] * ctx.num_inputs), *emissions


def as_multiplied(sink: Sink, tensor: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """An input as autocast cast it for the layer's product: half the memory, and on CUDA its fast products."""
    lower = tensor.dtype == torch.float32 and output.dtype in (torch.bfloat16, torch.float16)
    return sink.cast(tensor, output.dtype) if lower else tensor
