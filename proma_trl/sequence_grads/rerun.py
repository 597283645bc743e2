"""The general rule, for modules without one of their own: in the backward pass, the module runs again, one sequence at
a time, and autograd computes the gradients of its parameters for each.

It holds for every module that treats the sequences of a microbatch one by one. That is checked wherever its arguments
are of a kind that has not been seen before. It costs one more forward pass of the module, and a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache

from ..devices import random_states, set_random_states
from .forms import Dense, SequenceGrads
from .layer import ONE_SEQUENCE, Layer, Sink, Spread, alias, autocast_dtype, output_tolerance, overflows
from .probe import random_numbers_kept

# Where a tensor has the sequences: nowhere; in its leading dimension, there alone, together with the tokens, or with
# something else, such as heads; in its second dimension, before that of the tokens; or, of layers on images, in its
# leading dimension, as images are spread over them
_WHOLE, _SPLIT, _FLAT, _BLOCKS, _SECOND, _IMAGES = "whole", "split", "flat", "blocks", "second", "images"


class RerunRefused(RuntimeError):
    """
    A module does not treat the sequences of a microbatch one by one, or is not given them so.

    Args:
        message (`str`): What to tell the user.
        module (`nn.Module`): The module.
    """

    def __init__(self, message: str, module: nn.Module):
        super().__init__(message)
        self.module = module


class RerunSink(Sink, Protocol):
    """A [`Sink`] that can be deaf for a while."""

    def suspended(self) -> AbstractContextManager[None]:
        """Within the context, layers that run are not followed."""


@dataclass
class _Call:
    """
    One run of a module: what it was given, with the places of tensors, and under which circumstances it ran.

    Attributes:
        leaves (`list`): Its arguments, flat; `None` in the places of tensors, which autograd keeps.
        places (`list[int]`): The places of tensors.
        structure: What makes arguments of the flat list again.
        num_sequences (`int`), num_tokens (`int` or `None`): k and T.
        autocast (`torch.dtype` or `None`): What autocast cast to.
        rows ([`Spread`] or `None`): Where the module runs on images, how these are spread over the sequences.
        random (`list` or `None`): The states of random number generators, if it drew from them.
        expected (`list` or `None`): Its outputs, for a check.
    """

    leaves: list[Any]
    places: list[int]
    structure: Any
    num_sequences: int
    num_tokens: int | None
    autocast: torch.dtype | None
    rows: Spread | None
    random: list[torch.Tensor] | None
    expected: list[torch.Tensor] | None = None

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple, dict]:
        """Its arguments, with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.structure)

    def layout(self, tensor: torch.Tensor) -> str:
        """Where a tensor seems to have the sequences."""
        if self.rows is not None:
            return _WHOLE if self.rows.counts(tensor) is None else _IMAGES
        k, length, rows = self.num_sequences, self.num_tokens, tensor.shape[0] if tensor.dim() else 0
        if length is not None and rows == k * length and (k > 1 or tensor.dim() == 2):
            return _FLAT
        is_second = tensor.dim() > 2 and tuple(tensor.shape[1:3]) == (k, length)
        # With as many heads as sequences, a mask over pairs of tokens looks like it
        if is_second and not (rows == k and tensor.shape[2:] == (length, length)):
            return _SECOND
        if rows == k and (tensor.dim() > 1 or length != k):
            return _SPLIT
        return _BLOCKS if tensor.dim() > 2 and rows > k and rows % k == 0 else _WHOLE

    def part(self, tensor: torch.Tensor, layout: str, i: int) -> torch.Tensor:
        """Sequence i of a tensor."""
        if layout == _WHOLE:
            return tensor
        if layout == _SECOND:
            return tensor[:, i : i + 1]
        if layout == _IMAGES:
            counts = self.rows.counts(tensor)
            return tensor[sum(counts[:i]) : sum(counts[: i + 1])]
        length = tensor.shape[0] // self.num_sequences
        return tensor[i * length : (i + 1) * length]

    def fits(self, tensor: torch.Tensor, layout: str) -> bool:
        """Whether a tensor can have the sequences there."""
        k = self.num_sequences
        if layout == _IMAGES:
            return self.rows.counts(tensor) is not None
        if layout == _SECOND:
            return tensor.dim() > 1 and tensor.shape[1] == k
        rows = {_SPLIT: k, _FLAT: k * (self.num_tokens or 1)}
        return layout == _WHOLE or tensor.shape[0] == rows.get(layout, tensor.shape[0] // k * k)


class RerunLayer(Layer):
    """
    A module without a rule, together with those of its children that have none either and no children of their own: a
    module may use their parameters without running them, as mixers do with a convolution's.

    Args:
        name (`str`): The module's name in the model.
        module (`nn.Module`): The module.
        param_names (`tuple[str, ...]`): Trainable parameters, `"A_log"` or `"conv1d.weight"`.
    """

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        super().__init__(name, module, param_names)
        self._random: list[torch.Tensor] | None = None
        # Where the sequences are in arguments and in outputs, for the kinds of arguments for which that was checked
        self._known: dict[tuple, tuple[list[str], list[str]]] = {}

    @property
    def _device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def tells_sequences(self, sink: Sink, args: tuple, kwargs: dict) -> bool:
        return True

    def enter(self, sink: RerunSink, args: tuple, kwargs: dict) -> None:
        self.entered = True
        self._random = random_states(self._device)
        self.hide_params()

    def exit(self) -> None:
        self.show_params()
        self.entered = False

    def leave(self, sink: RerunSink, args: tuple, kwargs: dict, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Cache))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[place].detach() for place in places]
        # A cache would go on to grow. In training it begins empty, so that the module does without
        leaves = [None if isinstance(leaf, (torch.Tensor, Cache)) else leaf for leaf in leaves]
        before, self._random = self._random, None
        drew = any(not torch.equal(a, b) for a, b in zip(before, random_states(self._device), strict=True))
        call = _Call(
            leaves,
            places,
            structure,
            sink.num_sequences,
            sink.num_tokens,
            autocast_dtype(self._device),
            sink.rows,
            before if drew else None,
        )
        outputs, output_structure = pytree.tree_flatten(output)
        found = [place for place, x in enumerate(outputs) if _takes_gradient(x)]
        if call.random is None and self._kind(call, tensors) not in self._known:
            call.expected = [outputs[place].detach() for place in found]
        passed = _RerunOutput.apply(
            self, sink, call, len(tensors), *tensors, *self.params.values(), *(outputs[place] for place in found)
        )
        for place, tensor in zip(found, passed, strict=True):
            outputs[place] = tensor
        return pytree.tree_unflatten(outputs, output_structure)

    def grads(
        self,
        sink: RerunSink,
        params: dict[str, nn.Parameter],
        call: _Call,
        tensors: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor | None],
    ) -> dict[str, SequenceGrads]:
        """
        Gradients of the module's parameters for each sequence.

        Raises:
            RerunRefused: If the module does not treat sequences one by one.
        """
        found = {name: [] for name in params}
        with (
            sink.suspended(),
            torch.enable_grad(),
            torch.autocast(self._device.type, dtype=call.autocast, enabled=call.autocast is not None),
            self._copies(params) as copies,
        ):
            grads_of = self._replayed if call.random is not None else self._one_by_one
            for grads in grads_of(call, tensors, grad_outputs, copies):
                for (name, param), grad in zip(params.items(), grads, strict=True):
                    found[name].append(torch.zeros_like(param) if grad is None else grad)
        return {
            name: Dense(torch.stack([g.view(g.shape or (1,)) for g in grads]), owned=True)
            for name, grads in found.items()
        }

    def _one_by_one(
        self,
        call: _Call,
        tensors: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor | None],
        copies: Sequence[torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor | None, ...]]:
        kind = self._kind(call, tensors)
        if call.expected is None:
            layouts, outer = self._known[kind]
        else:
            layouts, outer = ([call.layout(x) for x in of] for of in (tensors, call.expected))
        self._refuse_unknown(call, [*tensors, *grad_outputs], [*layouts, *outer])
        self._refuse_whole(grad_outputs, outer)
        for i in range(call.num_sequences):
            if call.rows is not None and not call.rows.has(i):
                yield (None,) * len(copies)
                continue
            parts = [call.part(x, layout, i) for x, layout in zip(tensors, layouts, strict=True)]
            outputs = self._run(call, parts) if call.expected is None else self._tried(call, parts, outer, i)
            yield _vjp(
                outputs,
                [None if g is None else call.part(g, at, i) for g, at in zip(grad_outputs, outer, strict=True)],
                copies,
            )
        # Where T equals k, that says nothing about other lengths, and one sequence says nothing about more of them
        tells = call.num_sequences not in (1, call.num_tokens)
        if call.expected is not None and tells and not any(overflows(x) for x in call.expected):
            self._known[kind] = layouts, outer

    def _replayed(
        self,
        call: _Call,
        tensors: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor | None],
        copies: Sequence[torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """With the random numbers of the forward pass, which were drawn for all sequences together."""
        outer = [_WHOLE if grad is None else call.layout(grad) for grad in grad_outputs]
        self._refuse_whole(grad_outputs, outer)
        with _random_numbers_from(call.random, copies[0].device):
            outputs = self._run(call, tensors)
        for i in range(call.num_sequences):
            masked = []
            for grad, at in zip(grad_outputs, outer, strict=True):
                masked.append(None if grad is None else torch.zeros_like(grad))
                if grad is not None:
                    call.part(masked[-1], at, i).copy_(call.part(grad, at, i))
            yield _vjp(outputs, masked, copies, retain_graph=i + 1 < call.num_sequences)

    def _run(self, call: _Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        args, kwargs = call.arguments(tensors)
        # Not as a module, whose own hooks follow it
        return [x for x in pytree.tree_leaves(self.module.forward(*args, **kwargs)) if _takes_gradient(x)]

    def _refuse_whole(self, grad_outputs: Sequence[torch.Tensor | None], outer: Sequence[str]) -> None:
        if any(grad is not None and at == _WHOLE for grad, at in zip(grad_outputs, outer, strict=True)):
            raise self._refusal("it has an output that is not one entry a sequence")

    def _refuse_unknown(self, call: _Call, tensors: Sequence[torch.Tensor | None], layouts: Sequence[str]) -> None:
        for tensor, layout in zip(tensors, layouts, strict=True):
            if call.rows is not None and tensor is not None and tensor.dim() and layout == _WHOLE:
                # It may be of single images, and their sizes in another microbatch different
                raise self._refusal(f"it is unknown which images a tensor of shape {tuple(tensor.shape)} belongs to")
            if tensor is not None and not call.fits(tensor, layout):
                raise self._refusal(
                    f"where they were first is not where they can be in a tensor of shape {tuple(tensor.shape)}"
                )

    def _tried(self, call: _Call, parts: Sequence[torch.Tensor], outer: Sequence[str], i: int) -> list[torch.Tensor]:
        """A sequence's outputs, if they are those that it had among the others."""
        try:
            outputs = self._run(call, parts)
        except Exception as error:  # whatever it is that one sequence alone is too few for
            raise self._refusal(f"on one of them alone, it fails ({error})") from error
        for together, alone, layout in zip(call.expected, outputs, outer, strict=True):
            if layout == _WHOLE or overflows(together):
                continue
            want, got = call.part(together, layout, i), alone.detach()
            if want.shape != got.shape:
                raise self._refusal("on one of them alone, it has an output of another shape")
            # A mask's infinities are equal, and have no difference
            difference = torch.where(got == want, 0, got - want)
            if not difference.norm() <= output_tolerance(want.dtype, call.autocast) * want[want.isfinite()].norm():
                raise self._refusal("on one of them alone, it has another output than on all of them")
        return outputs

    def _refusal(self, why: str) -> RerunRefused:
        return RerunRefused(
            f"`{self.name}` ({type(self.module).__name__}) does not treat the sequences of a microbatch one by one: "
            f"{why}. Train with {ONE_SEQUENCE}, freeze its parameters, or register a rule for its class "
            "(`proma_trl.register_rule`).",
            self.module,
        )

    @staticmethod
    def _kind(call: _Call, tensors: Sequence[torch.Tensor]) -> tuple:
        """What arguments have in common whose sequences are in the same places."""
        return (*call.places, *(x.dim() for x in tensors))

    @contextmanager
    def _copies(self, params: dict[str, nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """Within the context, the module computes with copies of its parameters. Yields them."""
        copies = [param.detach().requires_grad_() for param in params.values()]
        hidden = [(holder, own, holder.__dict__.get(own)) for _, holder, own in self.holders()]
        try:
            for (holder, own, _), copy in zip(hidden, copies, strict=True):
                holder.__dict__[own] = copy
            yield copies
        finally:
            for holder, own, before in hidden:
                holder.__dict__.pop(own, None)
                if before is not None:
                    holder.__dict__[own] = before


class _RerunOutput(torch.autograd.Function):
    """Passes a module's outputs on; backward, hands its parameters' sequence gradients over."""

    @staticmethod
    def forward(ctx, layer, sink, call, num_tensors, *values):
        ctx.layer, ctx.sink, ctx.call, ctx.num_tensors = layer, sink, call, num_tensors
        ctx.set_materialize_grads(False)
        count = num_tensors + len(layer.param_names)
        ctx.params = dict(zip(layer.param_names, values[num_tensors:count], strict=True))
        ctx.save_for_backward(*values[:num_tensors])
        return tuple(alias(output) for output in values[count:])

    @staticmethod
    def backward(ctx, *grad_outputs):
        layer, sink = ctx.layer, ctx.sink
        grads = layer.grads(sink, ctx.params, ctx.call, ctx.saved_tensors, grad_outputs)
        ctx.call = None
        emissions = [sink.receive(param, grads[name]) for name, param in ctx.params.items()]
        return None, None, None, None, *([None] * ctx.num_tensors), *emissions, *grad_outputs


def _takes_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _vjp(
    outputs: Sequence[torch.Tensor],
    grad_outputs: Sequence[torch.Tensor | None],
    copies: Sequence[torch.Tensor],
    retain_graph: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    pairs = [
        (x, g.to(x.dtype)) for x, g in zip(outputs, grad_outputs, strict=True) if g is not None and x.requires_grad
    ]
    if not pairs:
        return (None,) * len(copies)
    values, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(values, copies, grads, retain_graph=retain_graph, allow_unused=True)


@contextmanager
def _random_numbers_from(states: Sequence[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Within the context, random numbers are drawn from these states; then from where they were before."""
    with random_numbers_kept(device):
        set_random_states(states, device)
        yield
