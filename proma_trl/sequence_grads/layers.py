"""How hooks follow the modules that hold trainable parameters, so that each use of a parameter yields its sequence
gradients.

Most modules follow a rule: they run on detached parameters, and a node behind their output forms the sequence
gradients from what went in and the gradient that comes back. Embeddings are the same at the lookup itself.
Normalization layers without a rule run on one copy of their parameters a sequence.
"""

import sys
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .embedding import LookupMode, embedding_grads, embedding_refusal
from .factored import Dense, SequenceGrads
from .norm import broadcasts_parameters
from .registry import Rule, rule_for

# The way out of every error about a layer's sequence gradients
ONE_SEQUENCE = (
    "one sequence a microbatch, which works with every layer (`per_device_train_batch_size=1` in a trainer, "
    "`microbatch_size=1` here)"
)


class Sink(Protocol):
    """
    What receives sequence gradients: the microbatch that is at work.

    Attributes:
        num_sequences (`int`): k.
        num_tokens (`int` or `None`): Length T of the sequences in the model's input, where it consists of tokens.
    """

    num_sequences: int
    num_tokens: int | None

    def expect(self, param: nn.Parameter) -> None:
        """Announce, in the forward pass, that `receive` will be called once more for `param`."""

    def receive(self, param: nn.Parameter, grads: SequenceGrads) -> torch.Tensor | None:
        """Take the gradients of one use of `param`. Returns what to emit as its gradient, or `None` for later."""


def by_sequence(sink: Sink, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """
    View a layer's input or gradient, which may come as `(k * T, ...)`, as `(k, ...)`.

    Raises:
        ValueError: If the tensor's shape does not tell which sequence an entry belongs to.
    """
    k, length = sink.num_sequences, sink.num_tokens
    if k == 0:
        raise ValueError(
            f"`{name}` ran inside `capture()` before the model that was given to `ProjectedAccumulation` did, so that "
            "the number of sequences is unknown. Call it outside, or within the model's forward pass."
        )
    if tensor.dim() >= 2 and length is not None and tensor.shape[0] == k * length and (tensor.dim() == 2 or k > 1):
        return tensor.view(k, length, *tensor.shape[1:])
    if tensor.shape[:1] == (k,) and (tensor.dim() > 2 or length in (None, 1)):
        return tensor
    raise ValueError(
        f"`{name}` ran on a tensor of shape {tuple(tensor.shape)}, in which the {k} sequences"
        f"{'' if length is None else f' of {length} tokens'} can't be told apart. Train with {ONE_SEQUENCE}, "
        "or freeze its parameters."
    )


def _as_multiplied(tensor: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """An input as autocast cast it for the layer's product: half the memory, and on CUDA its fast products."""
    lower = tensor.dtype == torch.float32 and output.dtype in (torch.bfloat16, torch.float16)
    return tensor.to(output.dtype) if lower else tensor


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without being a view to autograd, so that models may go on to write to it in place."""
    return tensor.detach()


class Layer:
    """
    What hooks need to know of one module that holds trainable parameters.

    Args:
        name (`str`): The module's name in the model.
        module (`nn.Module`): The module.
        param_names (`tuple[str, ...]`): Its own trainable parameters.
    """

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        self.name = name
        self.module = module
        self.param_names = param_names
        self.entered = False
        self.handles: tuple = ()

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters as the module holds them now: FSDP exchanges shards for whole ones while a module runs."""
        return {name: self.module._parameters[name] for name in self.param_names}

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> tuple | None:
        raise NotImplementedError

    def exit(self) -> None:
        """Undo what `enter` did to the module."""
        raise NotImplementedError

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        return None


class _RuleLayer(Layer):
    """A module with a rule: its parameters take no gradient while it runs; a node behind its output forms theirs."""

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...], rule: Rule):
        super().__init__(name, module, param_names)
        self.rule = rule

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True
        # ZeRO-3 frees the memory of a parameter when its module has run, and gets it back for the backward pass.
        # Detached tensors would keep that memory alive. Where a checkpointed layer runs again just before its
        # backward pass they must: torch compares what is saved then with what was saved first.
        runs_again = torch._C._current_graph_task_id() != -1
        for name, param in self.params.items():
            if runs_again:
                self.module.__dict__[name] = param.detach()
            else:
                param.requires_grad_(False)

    def exit(self) -> None:
        for name, param in self.params.items():
            self.module.__dict__.pop(name, None)
            param.requires_grad_(True)
        self.entered = False

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"`{self.name}` has a rule, so its output must be one tensor, got {type(output)}.")
        inputs = [_as_multiplied(x.detach(), output) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        return _Rule.apply(output, self, sink, len(inputs), *inputs, *self.params.values())

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


class _Rule(torch.autograd.Function):
    """Passes a layer's output on; backward, hands its parameters' sequence gradients over."""

    @staticmethod
    def forward(ctx, output, layer, sink, num_inputs, *tensors):
        ctx.layer, ctx.sink, ctx.num_inputs = layer, sink, num_inputs
        ctx.params = dict(zip(layer.param_names, tensors[num_inputs:], strict=True))
        ctx.save_for_backward(*tensors[:num_inputs])
        return _alias(output)

    @staticmethod
    def backward(ctx, grad_output):
        layer, sink = ctx.layer, ctx.sink
        grads = layer.grads(sink, ctx.params, ctx.saved_tensors, grad_output)
        emissions = [sink.receive(param, grads[name]) for name, param in ctx.params.items()]
        return grad_output, None, None, None, *([None] * ctx.num_inputs), *emissions


class _EmbeddingLayer(Layer):
    """An embedding: its lookups, wherever its forward makes them, run on the detached weight."""

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True
        self.mode = LookupMode(self.module.weight, partial(self.lookup, sink))
        self.mode.__enter__()

    def exit(self) -> None:
        self.mode.__exit__(None, None, None)
        self.mode = None
        self.entered = False

    def lookup(self, sink: Sink, ids: torch.Tensor, weight: nn.Parameter, padding_idx: int | None) -> torch.Tensor:
        ids = self.per_sequence(sink, ids)
        output = F.embedding(ids, weight.detach(), padding_idx)
        return _Lookup.apply(output, ids, padding_idx, sink, weight)

    def per_sequence(self, sink: Sink, ids: torch.Tensor) -> torch.Tensor:
        k, length = sink.num_sequences, sink.num_tokens
        if ids.dim() >= 2 and ids.shape[0] == k and (length is None or ids.shape[1] == length):
            return ids
        # Positions come once for all sequences
        if length is not None and ids.shape in ((length,), (1, length)):
            return ids.expand(k, -1)
        if length is None and ids.dim() == 1 and len(ids) == k:
            return ids
        return by_sequence(sink, ids.unsqueeze(-1), self.name).squeeze(-1)


class _Lookup(torch.autograd.Function):
    """Passes what was looked up on; backward, hands the embedding's sequence gradients over."""

    @staticmethod
    def forward(ctx, output, ids, padding_idx, sink, weight):
        ctx.padding_idx, ctx.sink, ctx.weight, ctx.num_rows = padding_idx, sink, weight, len(weight)
        ctx.save_for_backward(ids)
        return _alias(output)

    @staticmethod
    def backward(ctx, grad_output):
        (ids,) = ctx.saved_tensors
        grads = embedding_grads(ids, ctx.padding_idx, ctx.num_rows, grad_output)
        return None, None, None, None, ctx.sink.receive(ctx.weight, grads)


class _BroadcastLayer(Layer):
    """A normalization layer: runs on one copy of its parameters a sequence."""

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        values = args[0] if args else next(iter(kwargs.values()))
        per_sequence = by_sequence(sink, values, self.name)
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


def foreign_modules(model: nn.Module) -> dict[nn.Module, str]:
    """
    Modules of a model whose inputs are not one entry a sequence, or whose parameters other modules multiply, and why:
    all that a multimodal model has outside its text decoder, and what PEFT's `ParamWrapper` holds.
    """
    found: dict[nn.Module, str] = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if isinstance(base, PreTrainedModel) and config.get_text_config(decoder=True) is not config:
        text = {*base.get_decoder().modules()}
        for embedding in (base.get_output_embeddings(), base.get_input_embeddings()):
            text.update(() if embedding is None else embedding.modules())
        why = "runs outside the text decoder, so that it isn't known which sequence an image (or its patch) belongs to"
        found |= {module: why for module in base.modules() if module not in text}
    peft_layers = sys.modules.get("peft.tuners.lora.layer")
    for wrapper in model.modules() if peft_layers is not None else ():
        if isinstance(wrapper, peft_layers.ParamWrapper):
            why = f"PEFT's `ParamWrapper` multiplies its weights to change `{wrapper.parameter_name}`"
            adapters = (getattr(wrapper, name) for name in wrapper.adapter_layer_names)
            found |= {module: why for adapter in adapters for module in adapter.modules()}
    return found


def layer_for(name: str, module: nn.Module, names: tuple[str, ...]) -> Layer | str:
    """How a module with the trainable parameters `names` is followed, or why it can't be."""
    if isinstance(module, nn.Embedding):
        refusal = embedding_refusal(module)
        if refusal is None and names != ("weight",):
            refusal = "it holds more than a weight"
        return refusal or _EmbeddingLayer(name, module, names)
    rule = rule_for(module)
    if rule is not None:
        return _RuleLayer(name, module, names, rule)
    if broadcasts_parameters(module):
        return _BroadcastLayer(name, module, names)
    return f"holds {', '.join(f'`{n}`' for n in names)} and has no rule"
