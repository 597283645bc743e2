"""The hooks by which a model's layers and parameters report to the current microbatch, and how long they live."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..backends import Backend
from ..sequence_grads.images import placeholder
from ..sequence_grads.layer import Layer, Sink
from ..sequence_grads.probe import runs_as
from ..sequence_grads.product import ProductLayer
from ..sequence_grads.rerun import RerunLayer
from ..torch_internals import are_innermost, run_first
from .microbatch import Microbatch, Phase

logger = logging.getLogger(__name__)

# The hooks on each model: a second accumulation on the same model takes the place of the first
_HOOKED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ModelHooks]] = weakref.WeakKeyDictionary()


class ModelHooks:
    """
    Hooks on a model's layers, and on the leaves that autograd computes gradients for.

    Args:
        model (`nn.Module`): The model.
        microbatch_size (`int`): With 1, a parameter's gradient is that of the sequence.
        plan (`Callable`): From a model to how its layers are followed.
        needs_sequences (`bool`): Whether every parameter's sequence gradients are needed. If not, those that no
            followed layer holds are left to autograd.
        active (`Callable`): Returns the current microbatch, or `None`: one being recorded, or one whose backward pass
            runs a checkpointed layer again. It is called with `True` where the model itself is about to run.

    Raises:
        ValueError: If some layers don't yield sequence gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        microbatch_size: int,
        plan: Callable[[nn.Module], list[Layer]],
        needs_sequences: bool,
        active: Callable[[bool], Microbatch | None],
    ):
        self._model = model
        self._microbatch_size = microbatch_size
        self._plan_layers = plan
        # Layers that may stay without sequence gradients, where autograd's suffice
        self._optional = microbatch_size == 1 or not needs_sequences
        self._needs_sequences = needs_sequences
        self._skipped: set[str] = set()
        self._active = active
        self._layers: list[Layer] = []
        self._handles: list = []
        self._leaves: set[nn.Parameter] = set()
        self._planned: dict[str, object] = {}
        self._plan()

    def refresh(self) -> None:
        """Make hooks follow the model as it is now: parameters can be frozen, modules replaced, other hooks added."""
        if self._planned != self._signature():
            self._plan()
        elif not self._handles or not all(are_innermost(layer.module, *layer.handles) for layer in self._layers):
            self._hook()

    def follows(self, param: nn.Parameter) -> bool:
        """Whether a followed layer multiplies its input by `param`."""
        return any(matrix is param for layer in self._layers for matrix in layer.matrices)

    def rerun_layers(self) -> list[RerunLayer]:
        """The modules that run again in the backward pass."""
        return [layer for layer in self._layers if isinstance(layer, RerunLayer)]

    def left_by_intra(self) -> list[nn.Parameter]:
        """The parameters of layers that multiply by a matrix and are not among those that Intra-PROMA projects."""
        layers = [layer for layer in self._layers if layer.on_images or isinstance(layer, ProductLayer)]
        return [param for layer in layers for param in layer.params.values()]

    def follows_module(self, module: nn.Module) -> bool:
        """Whether a module is followed by itself."""
        return any(layer.module is module for layer in self._layers)

    def hook_leaves(self, backend: Backend) -> None:
        """Hook onto what autograd will give the parameters."""
        for name, leaf in backend.leaves():
            if leaf not in self._leaves:
                self._leaves.add(leaf)
                handle = leaf.register_hook(partial(self._leaf_gradient, leaf, name))
                # Before the hooks of others, which then act on what is emitted, as on an ordinary gradient. What they
                # leave is accumulated, and is `acc` to later microbatches where that is read from `param.grad`
                run_first(leaf, handle)
                self._handles.append(handle)

    def remove(self) -> None:
        """Remove all hooks, until the next `refresh`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leaves.clear()

    def _plan(self) -> None:
        previous = _HOOKED.get(self._model, lambda: None)()
        if previous is not None:
            previous.remove()
        self._layers = self._plan_layers(self._model)
        _HOOKED[self._model] = weakref.ref(self)
        self._planned = self._signature()
        self._hook()

    def _signature(self) -> dict[str, object]:
        # By name, as FSDP exchanges the parameters themselves, and may hold a tied one twice
        trained = {name: param.requires_grad for name, param in self._model.named_parameters(remove_duplicate=False)}
        # Kernels can replace classes or single modules' `forward` after this was made, as Liger's do in `train`
        return {**trained, **{layer.name: runs_as(layer.module) for layer in self._layers}}

    def _hook(self) -> None:
        """Register all hooks, inside those that others have registered: ZeRO-3's, which gather and free weights."""
        self.remove()
        self._handles.append(self._model.register_forward_pre_hook(self._model_runs, with_kwargs=True))
        for layer in self._layers:
            layer.handles = (
                layer.module.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True),
                layer.module.register_forward_hook(
                    partial(self._leave, layer), with_kwargs=True, always_call=True, prepend=True
                ),
            )
            self._handles += layer.handles

    def _model_runs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        microbatch = self._active(True)
        if microbatch is not None and microbatch.phase is Phase.RECORDING:
            names = [*inspect.signature(module.forward).parameters]
            if "attention_mask" in names[: len(args)]:
                kwargs = {**kwargs, "attention_mask": args[names.index("attention_mask")]}
            microbatch.read_input(args, kwargs, next(self._model.parameters()).device)
            if any(layer.on_images for layer in self._layers):
                microbatch.read_images(args, kwargs, placeholder(self._model))

    def _enter(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        microbatch = self._active(False)
        if microbatch is None or microbatch.is_suspended:
            return None
        sink = _sink(microbatch, layer)
        if self._optional and not layer.tells_sequences(sink, args, kwargs):
            self._say_skipped(layer)
            return None
        if microbatch.phase is Phase.RECORDING:
            for param in layer.params.values():
                microbatch.expect(param)
        # Reentrant checkpointing runs the layer without gradients first, and records it in the backward pass
        return layer.enter(sink, args, kwargs) if torch.is_grad_enabled() else None

    def _leave(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output):
        if not layer.entered:
            return None
        # First of all undo what entering did, also where the layer was stopped half way (`output` of `None`)
        layer.exit()
        return None if output is None else layer.leave(_sink(self._active(False), layer), args, kwargs, output)

    def _leaf_gradient(self, leaf: nn.Parameter, name: str, grad: torch.Tensor | None) -> torch.Tensor | None:
        microbatch = self._active(False)
        if grad is None or microbatch is None or microbatch.phase is not Phase.BACKWARD:
            return grad
        if not microbatch.follows(leaf) and self._optional:
            changes = self._needs_sequences or microbatch.is_projected(leaf)
            return microbatch.receive_whole(leaf, name, grad) if changes else grad
        microbatch.check_emitted(leaf, name, grad)
        return None

    def _say_skipped(self, layer: Layer) -> None:
        if layer.name not in self._skipped:
            self._skipped.add(layer.name)
            logger.warning(
                "`%s` runs on rows of which the sequence is not known: its weight keeps its ordinary policy gradient, "
                "which Intra-PROMA does not project.",
                layer.name,
            )


def _sink(microbatch: Microbatch, layer: Layer) -> Sink:
    """What a layer reports to."""
    if not layer.on_images:
        return microbatch
    if microbatch.images is None:
        raise ValueError(
            f"`{layer.name}` ran inside `capture()` before the model that was given to `ProjectedAccumulation` did, "
            "so that it is unknown whose images it ran on. Call it outside, or within the model's forward pass."
        )
    return microbatch.images
