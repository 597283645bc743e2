"""One microbatch: from its forward pass to the gradients that its backward pass emits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from ..backends import Backend, is_distributed, whole_shape
from ..rules import InnerProducts, UpdateRule
from ..sequence_grads.forms import Dense, SequenceGrads, sum_dtype
from ..sequence_grads.layer import ONE_SEQUENCE
from ..sequence_grads.tensor import Scratch, TensorGrads
from ..torch_internals import backward_id, call_after_backward
from .accumulators import Accumulator, Request

NOT_CAPTURED = (
    "No forward pass was captured: call the model that was given to `ProjectedAccumulation` inside "
    "`with accumulation.capture():` before `accumulation.loss`."
)

_GIB = 2**30


class Phase(Enum):
    """The phases of a microbatch, in order."""

    RECORDING = "its forward pass is being recorded"
    RECORDED = "its forward pass was recorded"
    BACKWARD = "its backward pass runs"
    DONE = "its backward pass is over"


@dataclass(frozen=True)
class Engine:
    """
    What the microbatches of an accumulation share.

    Attributes:
        rule ([`UpdateRule`]): From inner products to coefficients.
        backend ([`Backend`]): Where gradients are kept.
        accumulator ([`Accumulator`]): Holds what has been accumulated.
        names (`dict[nn.Parameter, str]`): Names of the trainable parameters.
        microbatch_size (`int`): Largest number of sequences in a microbatch.
        memory_budget (`float`): GiB that the sequence gradients of one parameter may take.
        scratch ([`Scratch`]): Memory for them.
        mixed_precision (`torch.dtype` or `None`): What Accelerate autocasts the forward pass to.
    """

    rule: UpdateRule
    backend: Backend
    accumulator: Accumulator
    names: dict[nn.Parameter, str]
    microbatch_size: int
    memory_budget: float
    scratch: Scratch
    mixed_precision: torch.dtype | None


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
        advantages (`(k,)` or `None`): Coefficients of the policy gradient, once they are known.
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
        self.advantages: torch.Tensor | None = None
        self.backward_id = -1
        self._begin = begin
        self._end = end
        self._autocast: torch.dtype | None = engine.mixed_precision
        self._loss_scale: torch.Tensor | None = None
        self._uses: Counter[nn.Parameter] = Counter()
        self._remaining: dict[nn.Parameter, int] = {}
        self._parts: defaultdict[nn.Parameter, list[SequenceGrads]] = defaultdict(list)
        self._emitted: dict[nn.Parameter, int] = {}
        self._products: list[InnerProducts] = []

    # The forward pass

    def read_input(self, args: tuple, kwargs: dict, device: torch.device) -> None:
        """
        Take k, T and the precision from a call of the model.

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
        if self._autocast is None and torch.is_autocast_enabled(device.type):
            self._autocast = torch.get_autocast_dtype(device.type)

    def expect(self, param: nn.Parameter) -> None:
        """Announce that `receive` will be called once more for `param`."""
        self._uses[self.engine.backend.owner(param)] += 1

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """Lowest precision of the products that the sequence gradients of a parameter of `dtype` come from."""
        dtypes = [dtype] if self._autocast is None else [dtype, self._autocast]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def end_recording(self) -> None:
        """The forward pass is over."""
        self.phase = Phase.RECORDED

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

    # The backward pass

    def begin_backward(self, loss_scale: torch.Tensor) -> None:
        """
        The backward pass begins.

        Args:
            loss_scale (scalar): What the loss was multiplied by.

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
        self._loss_scale = loss_scale
        self._remaining = dict(self._uses)
        self.engine.accumulator.begin(self.advantages)
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
        """With one sequence, a parameter's gradient is that of the sequence. Returns what to emit in its place."""
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

    def check_emitted(self, leaf: nn.Parameter, name: str, grad: torch.Tensor) -> None:
        """
        Check that the gradient that reaches a parameter is what this microbatch emitted.

        Raises:
            RuntimeError: If it came from a use that was not recorded, and so escaped the update rule.
        """
        self.engine.backend.check_leaf_gradient(name, grad)
        if self._emitted.get(self.engine.backend.owner(leaf)) != grad.data_ptr():
            raise RuntimeError(
                f"`{name}` is used outside the forward pass of the layer that holds it, where its sequence gradients "
                f"can't be seen. Train with {ONE_SEQUENCE}, or freeze it."
            )

    def head_form(self, param: nn.Parameter, num_positions: int) -> str:
        """How the fused head holds its sequence gradients: dense, as factors, or not at all, as memory allows."""
        rows, size = whole_shape(param)
        row_bytes = self.num_sequences * rows * sum_dtype(param).itemsize
        budget = self.engine.memory_budget * _GIB / row_bytes
        if size <= budget and self._needs_products(self.engine.backend.owner(param)):
            return "dense"
        return "factors" if num_positions <= budget else "recompute"

    def abandon(self) -> None:
        """An exception ended its backward pass."""
        self.phase = Phase.DONE
        self._parts.clear()

    def metrics(self) -> dict[str, torch.Tensor]:
        """What the rule logs about the backward pass: scalars by name."""
        metrics = {}
        for group in ([p for p in self._products if (p.overlaps is None) == first] for first in (True, False)):
            if group:
                products = InnerProducts.stack(group)
                advantages = self.engine.accumulator.advantages.to(products.gram)
                metrics |= self.engine.rule.observe(products, advantages)
        return metrics

    def _emit(self, leaf: nn.Parameter, param: nn.Parameter) -> torch.Tensor:
        """`sum_i c_i s_i` from all uses of `param` that were received, typed as `leaf`, which autograd hands it to."""
        engine, accumulator = self.engine, self.engine.accumulator
        grads = self._tensor_grads(leaf, param)
        ranges = grads.ranges
        with torch.no_grad(), torch.autocast(leaf.device.type, enabled=False):
            if self._needs_products(param):
                products = accumulator.inner_products(self._request(leaf, param), grads)
                coefficients = engine.rule.coefficients(products, accumulator.advantages.to(products.gram))
                self._products.append(products)
                emission = grads.combine(coefficients[accumulator.own])
            else:
                emission = grads.combine(self.advantages)
            emission = emission.to(leaf.dtype).view(whole_shape(param))
            accumulator.keep(param, emission, ranges)
        self._emitted[param] = emission.data_ptr()
        return emission

    def _tensor_grads(self, leaf: nn.Parameter, param: nn.Parameter) -> TensorGrads:
        limit = int(self.engine.memory_budget * _GIB) // (self.engine.microbatch_size * sum_dtype(leaf).itemsize)
        shape = tuple(whole_shape(param)) or (1,)
        return TensorGrads(self._parts.pop(param), shape, leaf, self.num_sequences, limit, self.engine.scratch)

    def _needs_products(self, param: nn.Parameter) -> bool:
        rule = self.engine.rule
        return rule.needs_gram or (rule.needs_accumulated and self.engine.accumulator.holds(param))

    def _request(self, leaf: nn.Parameter, param: nn.Parameter) -> Request:
        return Request(
            name=self.engine.names[param],
            param=param,
            overlaps=self.engine.rule.needs_accumulated,
            inverts_gram=self.engine.rule.inverts_gram,
            precision=self.precision(leaf.dtype),
            loss_scale=self._loss_scale,
        )

    def _end_backward(self) -> None:
        # Parameters with a use on which the loss does not depend. Autograd has ended, so their gradient is added here
        for param in [param for param, parts in self._parts.items() if parts]:
            if is_distributed():
                raise RuntimeError(
                    f"A use of `{self.engine.names.get(param, 'a parameter')}` in the forward pass has no part in the "
                    "loss, so that its gradient is complete too late to be reduced over ranks. Leave the unused layer "
                    f"out of the forward pass, freeze it, or train with {ONE_SEQUENCE}."
                )
            emission = self._emit(param, param)
            param.grad = emission if param.grad is None else param.grad.add_(emission)
        self.phase = Phase.DONE
        if self._end is not None:
            self._end(self)
        self._products.clear()
        self._emitted.clear()


class StartBackward(torch.autograd.Function):
    """The loss of a microbatch: its value is the true one, its backward pass starts every sequence with weight one."""

    @staticmethod
    def forward(ctx, objective: torch.Tensor, value: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        ctx.microbatch, ctx.shape = microbatch, objective.shape
        return value.to(objective.dtype).clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        ctx.microbatch.begin_backward(grad_output)
        return grad_output.expand(ctx.shape), None, None
