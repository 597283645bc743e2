"""One microbatch: from its forward pass to the gradients that its backward pass emits."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn

from ..backends import is_distributed, whole_shape
from ..intra.intra_proma import IntraProjection
from ..sequence_grads.experts import ExpertFactors
from ..sequence_grads.forms import Dense, SequenceGrads, sum_dtype
from ..sequence_grads.images import ImageRows, ImageSink
from ..sequence_grads.layer import ONE_SEQUENCE, autocast_dtype
from ..torch_internals import StorageCache, backward_id, call_after_backward
from .captured_loss import foreign_uses, outside_term
from .emission import GIB, Emission, Engine, lowest_precision

NOT_CAPTURED = (
    "No forward pass was captured: call the model that was given to `ProjectedAccumulation` inside "
    "`with accumulation.capture():` before `accumulation.loss`."
)


class Phase(Enum):
    """The phases of a microbatch, in order."""

    RECORDING = "its forward pass is being recorded"
    RECORDED = "its forward pass was recorded"
    BACKWARD = "its backward pass runs"
    DONE = "its backward pass is over"


class Microbatch:
    """
    The sequences of one forward pass. It is recorded, given its advantages, and sent backward, once and in this order;
    anything else is a `RuntimeError`.

    Args:
        engine ([`Engine`]): What it shares with the others.
        begin (`Callable`): Called with the microbatch before its backward pass begins.
        end (`Callable`): Called with the microbatch after its backward pass.

    Attributes:
        phase ([`Phase`]): Its phase.
        num_sequences (`int`): k, read from the model's input; 0 until then.
        num_tokens (`int` or `None`): Length T of the input's sequences, where it consists of tokens.
        scored (`(k, T - 1)` or `None`): Where the model was called with labels, which positions have one.
        images ([`Sink`] or `None`): What layers on images report to, once `read_images` knows whose they are.
        advantages (`(k,)` or `None`): Coefficients of the policy gradient, once they are known.
        weights (`(k,)` or `None`): With what the sequences' objectives are weighted in the backward pass, once the
            advantages are known; `None` where all weights are one.
    """

    def __init__(
        self,
        engine: Engine,
        begin: Callable[[Microbatch], None] | None = None,
        end: Callable[[Microbatch], None] | None = None,
    ):
        self.engine = engine
        self.phase = Phase.RECORDING
        self.num_sequences = 0
        self.num_tokens: int | None = None
        self.rows = None
        self.scored: torch.Tensor | None = None
        self.images: ImageSink | None = None
        self.advantages: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self.backward_id = -1
        self.is_suspended = False
        self._begin = begin
        self._end = end
        self._autocast: torch.dtype | None = engine.mixed_precision
        self._uses: Counter[nn.Parameter] = Counter()
        self._remaining: dict[nn.Parameter, int] = {}
        self._parts: defaultdict[nn.Parameter, list[SequenceGrads]] = defaultdict(list)
        # Addresses. Autograd adds other gradients to an emission in a new place, as this is a view
        self._emitted: dict[nn.Parameter, int] = {}
        self._start: Callable[[], Any] = lambda: None
        self._real: torch.Tensor | None = None
        self._device = torch.device("cpu")
        self._emission: Emission | None = None
        self._cast: StorageCache[torch.Tensor] = StorageCache()

    # The forward pass

    def read_input(self, args: tuple, kwargs: dict, device: torch.device) -> None:
        """
        Take k, T, the attention mask and the precision from a call of the model.

        Raises:
            ValueError: If it holds more sequences than declared, or another number than an earlier call.
        """
        value = kwargs.get("input_ids")
        value = kwargs.get("inputs_embeds") if value is None else value
        if value is None:
            value = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim() > 0), None)
        if value is None:
            raise ValueError("The model was called without a tensor, so that its number of sequences is unknown.")
        k, size = value.shape[0], self.engine.microbatch_size
        if k > size:
            raise ValueError(
                f"The microbatch holds {k} sequences, more than `microbatch_size={size}`: give "
                "`ProjectedAccumulation` the largest number of sequences that a microbatch can hold."
            )
        if self.num_sequences not in (0, k):
            raise ValueError(
                f"The model ran on {self.num_sequences} sequences and then on {k} within one `capture()`: a "
                "microbatch's forward passes must hold the same sequences."
            )
        is_tokens = (value.dim() == 2 and not value.is_floating_point()) or value.dim() == 3
        self.num_sequences, self.num_tokens = k, value.shape[1] if is_tokens else None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and is_tokens and mask.shape == value.shape[:2]:
            self._real = mask != 0
        labels = kwargs.get("labels")
        if isinstance(labels, torch.Tensor):
            self.scored = labels[:, 1:] != -100
        self._device = value.device
        if self._autocast is None:
            self._autocast = autocast_dtype(device)

    def read_images(self, args: tuple, kwargs: dict, placeholder: int) -> None:
        """
        Find out from a call of the model which images belong to which sequence.

        Args:
            args (`tuple`), kwargs (`dict`): What the model is called with.
            placeholder (`int`): The id of the tokens that image features take the places of.

        Raises:
            ValueError: If it is called without token ids, or with videos.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or kwargs.get("pixel_values_videos") is not None:
            what = "token ids" if ids is None else "images alone, and no videos"
            raise ValueError(
                f"Trainable layers run on images, and which sequence each of these belongs to is known from {what}. "
                f"Train with {ONE_SEQUENCE}, or freeze all outside the text decoder."
            )
        self.images = ImageSink(self, ImageRows((ids == placeholder).sum(1).tolist()))

    def expect(self, param: nn.Parameter) -> None:
        """Announce that `receive` will be called once more for `param`."""
        self._uses[self.engine.backend.owner(param)] += 1

    def follows(self, param: nn.Parameter) -> bool:
        """Whether a layer that ran has announced gradients of `param`, or of what it stands for."""
        return self.engine.backend.owner(param) in self._uses

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`tensor` in another dtype: one copy for all layers that read it one after another."""
        found = self._cast.get(tensor)
        if found is None or found.dtype != dtype:
            found = tensor.to(dtype)
            self._cast = StorageCache()
            self._cast.put(tensor, found)
        return found

    def precision(self, *dtypes: torch.dtype) -> torch.dtype:
        """Lowest precision of the products that sequence gradients come from, for parameters of `dtypes`."""
        return lowest_precision(*dtypes, self._autocast)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the context, layers that run are not followed: a module runs again for its own parameters alone."""
        self.is_suspended = True
        try:
            yield
        finally:
            self.is_suspended = False

    def end_recording(self) -> None:
        """The forward pass is over."""
        self.phase = Phase.RECORDED
        self._cast = StorageCache()

    def weigh(self, advantages: torch.Tensor) -> None:
        """
        Take the advantages, `(k,)`.

        Raises:
            RuntimeError: If no forward pass was captured, or its backward pass is over.
            ValueError: If their number is not that of the sequences.
        """
        if not self.num_sequences:
            raise RuntimeError(NOT_CAPTURED)
        if self.phase in (Phase.BACKWARD, Phase.DONE):
            raise RuntimeError(
                f"The captured microbatch has been used: {self.phase.value}. Capture a forward pass for each loss."
            )
        if advantages.shape != (self.num_sequences,):
            raise ValueError(
                f"`advantages` must hold one number for each of {self.num_sequences} sequences, got "
                f"{advantages.shape}."
            )
        self.advantages = advantages.detach()
        self.weights = self.engine.sequence_weights(self.advantages)

    # The backward pass

    def begin_backward(self, loss_scale: torch.Tensor, start: Any) -> None:
        """
        The backward pass begins.

        Args:
            loss_scale (scalar): What the loss was multiplied by.
            start: The node in the loss's graph that the objective is behind.

        Raises:
            RuntimeError: If it has begun before, or the forward pass is still being recorded.
        """
        if self.phase is Phase.RECORDING:
            raise RuntimeError(
                "`backward` was called inside `with accumulation.capture():`. Leave the context first: what runs "
                "inside it is recorded as the forward pass."
            )
        if self.phase is not Phase.RECORDED:
            raise RuntimeError(
                f"A microbatch can be sent backward once, and {self.phase.value}. Capture its forward pass again."
            )
        if self._begin is not None:
            self._begin(self)
        self.phase, self.backward_id = Phase.BACKWARD, backward_id()
        # Its graph holds this microbatch
        self._start = weakref.ref(start)
        self._remaining = dict(self._uses)
        self.engine.accumulator.begin(self.advantages)
        self._emission = Emission(
            self.engine,
            self.num_sequences,
            # Where the backward pass has weighted the sequences with them, they are there already
            policy=self.advantages if self.weights is None else None,
            autocast=self._autocast,
            loss_scale=loss_scale,
            intra=self._intra_projection(),
        )
        call_after_backward(self._end_backward)

    def receive(self, param: nn.Parameter, grads: SequenceGrads) -> torch.Tensor | None:
        """Take the sequence gradients of one use. At the last use, return what all of them amount to."""
        if self.phase is not Phase.BACKWARD:
            raise RuntimeError(
                "A captured forward pass was sent backward without `accumulation.loss`, so that its advantages are "
                "unknown. Pass the objective through `accumulation.loss` and call `backward` on what it returns."
            )
        owner = self.engine.backend.owner(param)
        self._parts[owner].append(grads)
        self._remaining[owner] -= 1
        return self._emit(param, owner) if self._remaining[owner] <= 0 else None

    def receive_whole(self, leaf: nn.Parameter, name: str, grad: torch.Tensor) -> torch.Tensor:
        """
        Take the gradient that autograd computed for a leaf: with one sequence, that of the sequence; or, where single
        sequences are not needed, that of all. Returns what to emit in its place.
        """
        self.engine.backend.check_leaf_gradient(name, grad)
        param = self.engine.backend.owner(leaf)
        if param in self._emitted:
            raise RuntimeError(
                f"The gradient of `{name}` arrives in several parts, as it does where a parameter is shared and "
                "reentrant checkpointing splits the backward pass, or FSDP shards it once for each module. Set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`; with FSDP, train with more than one '
                "sequence a microbatch."
            )
        self._parts[param].append(Dense(grad.reshape(1, *(grad.shape or (1,)))))
        return self._emit(leaf, param)

    def receive_experts(self, param: nn.Parameter, experts: ExpertFactors) -> None:
        """Take what shapes the subspaces of some experts of a mixture, before the gradient of `param` is there."""
        self._emission.receive_experts(self.engine.backend.owner(param), experts)

    def is_projected(self, leaf: nn.Parameter) -> bool:
        """Whether the gradient that autograd computes for a leaf must be projected."""
        return self._emission.knows_experts(self.engine.backend.owner(leaf))

    def check_emitted(self, leaf: nn.Parameter, name: str, grad: torch.Tensor) -> None:
        """
        Check that the gradient that reaches a parameter is what this microbatch emitted.

        Raises:
            RuntimeError: If it came from elsewhere, and so escaped the update rule: from a use that was not recorded,
                from a compiled graph, or from another term of the loss.
        """
        self.engine.backend.check_leaf_gradient(name, grad)
        if self._emitted.get(self.engine.backend.owner(leaf)) == grad.data_ptr():
            return
        start = self._start()
        uses = None if start is None else foreign_uses(start, leaf)
        if uses == []:
            raise outside_term(f"`{name}`")
        if any("CompiledFunction" in use for use in uses or ()):
            raise RuntimeError(
                f"`{name}` gets its gradient from a compiled graph, in which its layer's hooks did not run. Graphs "
                "that `torch.compile` made earlier in this process stay in use: start a new process, or call "
                "`torch.compiler.reset()`, and train without `torch.compile`."
            )
        where = f" (`{uses[0]}`)" if uses else ""
        raise RuntimeError(
            f"`{name}` is used outside the forward pass of the layer that holds it, or on a tensor in which the "
            f"sequences can't be told apart, where its sequence gradients can't be seen{where}. Train with "
            f"{ONE_SEQUENCE}, or freeze it."
        )

    def head_form(self, param: nn.Parameter, num_positions: int, dtype: torch.dtype) -> str:
        """
        How the fused head holds its sequence gradients: dense, as factors, or not at all, as memory allows; or summed,
        where single sequences are not needed. Their elements are of `dtype`; factors have `num_positions` rows.
        """
        rows, size = whole_shape(param)
        budget = self.engine.memory_budget * GIB / (rows * dtype.itemsize)
        fits = num_positions <= budget
        if not self.engine.needs_sequences:
            return "factors" if fits else "summed"
        owner = self.engine.backend.owner(param)
        dense = (self.num_sequences + 1) * size <= budget
        if dense and self._emission.needs_products(owner) and not self._emission.projects(owner):
            return "dense"
        return "factors" if fits else "recompute"

    @property
    def projects_inputs(self) -> bool:
        """Whether Intra-PROMA acts, to which the inputs of all tokens matter."""
        return self.engine.intra is not None

    def head_rows(self, param: nn.Parameter, length: int, rows: torch.Tensor) -> torch.Tensor | None:
        """
        What Intra-PROMA multiplies the head's output gradients by first, those at the places `rows` of the first
        `length` tokens of all sequences, so that they need be made only once for it and all else; `None` if nothing.
        """
        return self._emission.head_rows(self.engine.backend.owner(param), length, rows, sum_dtype(param))

    def _intra_projection(self) -> IntraProjection | None:
        if self.engine.intra is None:
            return None
        return IntraProjection(
            self.engine.intra,
            self.engine.intra_key,
            self.num_sequences,
            self._real,
            self._device,
            self.weights,
            self.engine.intra_measures,
        )

    def abandon(self) -> None:
        """An exception ended its backward pass."""
        self.phase = Phase.DONE
        self._parts.clear()
        self._emitted.clear()

    def metrics(self) -> dict[str, torch.Tensor]:
        """What rule and Intra-PROMA log about the backward pass: scalars by name."""
        return self._emission.metrics()

    def _emit(self, leaf: nn.Parameter, param: nn.Parameter) -> torch.Tensor:
        """What all uses of `param` amount to, typed as `leaf`, which autograd hands it to."""
        emission = self._emission.emit(leaf, param, self._parts.pop(param))
        self._emitted[param] = emission.data_ptr()
        return emission

    def _end_backward(self) -> None:
        self.phase = Phase.DONE
        # Parameters with a use on which the loss does not depend. Autograd has ended, so their gradient is added here
        for param in [param for param, parts in self._parts.items() if parts]:
            if is_distributed():
                raise RuntimeError(
                    f"A use of `{self.engine.names.get(param, 'a parameter')}` in the forward pass has no part in the "
                    "loss, so that its gradient is complete too late to be reduced over ranks. Leave the unused layer "
                    f"out of the forward pass, freeze it, or train with {ONE_SEQUENCE}."
                )
            # By autograd, so that hooks of others act on it as on any gradient
            torch.autograd.backward([param], [self._emit(param, param)])
        if self._end is not None:
            self._end(self)
        self._emitted.clear()
        self._emission = None
