"""What all kinds of layers have in common: how hooks follow them, and how tensors are split by sequence."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from ..torch_internals import backward_runs, own_parameters
from .forms import SequenceGrads

# The way out of every error about a layer's sequence gradients
ONE_SEQUENCE = (
    "one sequence a microbatch, which works with every layer (`per_device_train_batch_size=1` in a trainer, "
    "`microbatch_size=1` here)"
)


class Spread(Protocol):
    """How the rows of tensors are spread over k sequences, each of which has some in a row, or none."""

    def has(self, i: int) -> bool:
        """Whether sequence i has any."""

    def counts(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """Rows of each sequence in the leading dimension of a tensor; `None` if it has other ones."""

    def tells(self, tensor: torch.Tensor) -> bool:
        """Whether `by_sequence` can tell the rows of a tensor apart."""

    def by_sequence(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """View a tensor `(rows, ...)`, or `(1, rows, ...)`, as `(k, R, ...)`, filled up with zeros."""

    def together(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The opposite of `by_sequence`, in the shape of `like`."""


class Sink(Protocol):
    """
    Receives sequence gradients: the current microbatch.

    Attributes:
        num_sequences (`int`): k.
        num_tokens (`int` or `None`): Length T of the sequences in the model's input, where it consists of tokens.
        rows ([`Spread`] or `None`): Where a layer runs on images, how these are spread over the sequences.
    """

    num_sequences: int
    num_tokens: int | None
    rows: Spread | None

    def expect(self, param: nn.Parameter) -> None:
        """Announce, in the forward pass, that `receive` will be called once more for `param`."""

    def receive(self, param: nn.Parameter, grads: SequenceGrads) -> torch.Tensor | None:
        """Take the gradients of one use of `param`. Returns what to emit as its gradient, or `None` for later."""

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`tensor` in another dtype: one copy for all layers that read it one after another."""


def by_sequence(sink: Sink, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """
    View a layer's input or gradient, which may come as `(k * T, ...)`, as `(k, ...)`; that of a layer on images as
    `(k, R, ...)`, with zeros where a sequence has fewer rows than R.

    Raises:
        ValueError: If the tensor's shape does not tell which sequence an entry belongs to.
    """
    k, length = sink.num_sequences, sink.num_tokens
    if sink.rows is not None:
        return sink.rows.by_sequence(tensor, name)
    if k == 0:
        raise ValueError(
            f"`{name}` ran inside `capture()` before the model that was given to `ProjectedAccumulation` did, so that "
            "the number of sequences is unknown. Call it outside, or within the model's forward pass."
        )
    if _is_flat(sink, tensor):
        return tensor.view(k, length, *tensor.shape[1:])
    if _is_split(sink, tensor):
        return tensor
    raise ValueError(
        f"`{name}` ran on a tensor of shape {tuple(tensor.shape)}, in which the {k} sequences"
        f"{'' if length is None else f' of {length} tokens'} can't be told apart. Train with {ONE_SEQUENCE}, "
        "or freeze its parameters."
    )


def is_by_sequence(sink: Sink, tensor: torch.Tensor) -> bool:
    """Whether [`by_sequence`] can tell the sequences of a tensor apart."""
    if sink.rows is not None:
        return sink.rows.tells(tensor)
    return sink.num_sequences > 0 and (_is_flat(sink, tensor) or _is_split(sink, tensor))


def _is_flat(sink: Sink, tensor: torch.Tensor) -> bool:
    """Whether a tensor is `(k * T, ...)`."""
    k, length = sink.num_sequences, sink.num_tokens
    is_flat = tensor.dim() >= 2 and length is not None and tensor.shape[0] == k * length
    return is_flat and (tensor.dim() == 2 or k > 1)


def _is_split(sink: Sink, tensor: torch.Tensor) -> bool:
    """Whether a tensor is `(k, ...)`."""
    return tensor.shape[:1] == (sink.num_sequences,) and (tensor.dim() > 2 or sink.num_tokens in (None, 1))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device, or `None` outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def output_tolerance(dtype: torch.dtype, autocast: torch.dtype | None) -> float:
    """By how much of its norm an output of `dtype` may differ from what it is when it is computed again."""
    return 1e-3 if max(torch.finfo(x).eps for x in (dtype, autocast or dtype)) < 1e-6 else 0.1


def overflows(output: torch.Tensor) -> bool:
    """Whether an output holds what is no number, or too large for one: it can't be compared with what it should be."""
    return not (output < torch.inf).all()  # a mask's negative infinities are as they should be


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without being a view to autograd, so that models may go on to write to it in place."""
    return tensor.detach()


def base_model(model: nn.Module) -> nn.Module:
    """The model beneath PEFT's adapters, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Layer:
    """
    One module that holds trainable parameters, as hooks see it.

    Args:
        name (`str`): The module's name in the model.
        module (`nn.Module`): The module.
        param_names (`tuple[str, ...]`): Its trainable parameters: its own, `"weight"`, or also a child's,
            `"conv1d.weight"`.

    Attributes:
        on_images (`bool`): Whether the module runs on images, or on what was made of them, instead of tokens.
    """

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        self.name = name
        self.module = module
        self.param_names = param_names
        self.entered = False
        self.handles: tuple = ()
        self.on_images = False

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters as the module holds them now: FSDP exchanges shards for whole ones while a module runs."""
        return {name: own_parameters(holder)[own] for name, holder, own in self.holders()}

    def holders(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Each parameter's name with the module that holds it, and its name there."""
        for name in self.param_names:
            path, _, own = name.rpartition(".")
            yield name, self.module.get_submodule(path), own

    def hide_params(self) -> None:
        """Let the module run with parameters that take no gradient."""
        # ZeRO-3 frees the memory of a parameter when its module has run, and gets it back for the backward pass.
        # Detached tensors would keep that memory alive. Where a checkpointed layer runs again just before its
        # backward pass they must: torch compares what is saved then with what was saved first.
        runs_again = backward_runs()
        for _, holder, own in self.holders():
            param = own_parameters(holder)[own]
            if runs_again:
                holder.__dict__[own] = param.detach()
            else:
                param.requires_grad_(False)

    def show_params(self) -> None:
        """Undo `hide_params`."""
        for _, holder, own in self.holders():
            holder.__dict__.pop(own, None)
            own_parameters(holder)[own].requires_grad_(True)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The trainable parameters that the module multiplies its input by, if it is a linear layer."""
        return []

    def tells_sequences(self, sink: Sink, args: tuple, kwargs: dict) -> bool:
        """Whether the sequences in the module's arguments can be told apart."""
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return all(is_by_sequence(sink, value) for value in values)

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> tuple | None:
        """Prepare the module before it runs. Returns other arguments for it, `(args, kwargs)`, or `None`."""
        raise NotImplementedError

    def exit(self) -> None:
        """Undo what `enter` did to the module."""
        raise NotImplementedError

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        """Called after `exit`, if the module ran to its end. Returns another output for it, or `None`."""
        return None
