"""TRL's fused LM head: log-probabilities of the sampled tokens straight from hidden states and the head's weight.

The head never runs as a module, and neither the logits nor their gradients are held: both are computed again, a range
of the vocabulary at a time, at the scored positions alone. The forward pass is TRL's own kernel. The backward pass is
ours, since the weight's gradient is needed for each sequence, `s_i = sum_t dlogits_it h_it^T`; on a GPU, TRL's kernel
makes the logits' gradients in it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from ..devices import accelerates
from ..sequence_grads.forms import (
    Dense,
    HeldFactor,
    SegmentProducts,
    Segments,
    SequenceGrads,
    add_product,
    held_dtype,
    product,
    sum_dtype,
)
from ..sequence_grads.layer import Sink
from .trl_internals import gathered_head, kernel_forward, kernel_state, logits_to_gradients, replaced_kernel

# Elements of one range of logits, positions x range of the vocabulary: 32 MiB in float32 on a CPU; on a GPU 128 MiB in
# bfloat16, so that products are large. TRL's own ranges are up to twice as large
_TILE_ELEMENTS, _TILE_ELEMENTS_ACCELERATED = 2**23, 2**26


class HeadSink(Sink, Protocol):
    """
    A [`Sink`] that also says how to hold the sequence gradients of the largest tensor of all.

    Attributes:
        scored (`(k, N)`): Which positions' log-probabilities are asked for.
        projects_inputs (`bool`): Whether Intra-PROMA acts, to which the inputs of all tokens matter.
    """

    scored: torch.Tensor
    projects_inputs: bool

    def head_form(self, param: nn.Parameter, num_positions: int, dtype: torch.dtype) -> str:
        """`"dense"`, `"factors"`, `"recompute"` or `"summed"`, for `num_positions` scored positions, in `dtype`."""

    def head_rows(self, param: nn.Parameter, length: int, rows: torch.Tensor) -> torch.Tensor | None:
        """
        What the gradients of the logits are multiplied by first, if at all, for a sweep over them: `(R, c)`, at the
        places `rows` of the first `length` tokens of all sequences.
        """


@contextmanager
def sequence_head(sink: HeadSink) -> Iterator[None]:
    """Within the context, TRL's fused LM head yields sequence gradients to `sink`, which receives them."""

    class Head:
        @staticmethod
        def apply(hidden, weight, bias, targets, *settings):
            # Positions are those of all sequences but for the last token: (k * N, H)
            counts = sink.scored.sum(1).tolist()
            rows = sink.scored.flatten().nonzero_static(size=sum(counts)).squeeze(1)
            arguments = (hidden.index_select(0, rows), weight, bias, targets.index_select(0, rows))
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                all_inputs = hidden.detach() if sink.projects_inputs else None
                scored = _SequenceLogProbs.apply(*arguments, settings, sink, counts, rows, all_inputs)
            else:
                scored = original.apply(*arguments, *settings)
            return tuple(None if x is None else x.new_zeros(len(hidden)).index_copy(0, rows, x) for x in scored)

    with replaced_kernel(Head) as original:
        yield


class _SequenceLogProbs(torch.autograd.Function):
    """TRL's `ChunkedLogProbFunction` on hidden states `(R, H)` of k sequences, which its backward pass keeps apart."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings, sink, counts, rows, all_inputs):
        outputs = kernel_forward(ctx, hidden, weight, bias, targets, *settings)
        ctx.params, ctx.sink, ctx.counts, ctx.rows, ctx.all_inputs = (weight, bias), sink, counts, rows, all_inputs
        for param in ctx.params:
            if param is not None and param.requires_grad:
                sink.expect(param)
        return outputs

    @staticmethod
    def backward(ctx, grad_logprobs, *_):
        # Entropy bonuses are refused, so only log-probabilities have gradients
        kernel = kernel_state(ctx)
        weight, bias = kernel.weight, kernel.bias
        weight_param, bias_param = ctx.params
        needs_weight, needs_bias = weight.requires_grad, bias is not None and bias.requires_grad
        with gathered_head(weight, bias), torch.autocast(kernel.hidden.device.type, enabled=False):
            head = HeadGrads(kernel, grad_logprobs, ctx.counts, ctx.rows, ctx.sink.scored.shape[1], ctx.all_inputs)
            form = rows = None
            if needs_weight:
                form = ctx.sink.head_form(weight_param, len(ctx.rows), head.dtype)
                rows = ctx.sink.head_rows(weight_param, head.num_tokens, ctx.rows)
            grad_hidden, grads, bias_grads = head.backward(form, needs_bias, rows)
            grad_weight = ctx.sink.receive(weight_param, grads) if needs_weight else None
            grad_bias = ctx.sink.receive(bias_param, Dense(bias_grads)) if needs_bias else None
        return grad_hidden.to(kernel.hidden.dtype), grad_weight, grad_bias, *([None] * 6)


class HeadGrads:
    """
    The head weight's sequence gradients, as a form that is recomputed: the gradients of the logits, which they are the
    products of, are made again for any range of the vocabulary.

    Args:
        kernel ([`KernelState`]): What the forward pass has kept, at R scored positions.
        grad_logprobs (`(R,)`): Gradient of the tokens' log-probabilities.
        counts (`list[int]`): Number of positions of each sequence.
        rows (`(R,)`): Their places among all tokens of the k sequences.
        num_tokens (`int`): Number of all tokens of a sequence, N.
        all_inputs (`(k * N, H)`, *optional*): Hidden states of all tokens.
    """

    inputs = "right"

    def __init__(self, kernel, grad_logprobs, counts, rows, num_tokens, all_inputs=None):
        hidden = kernel.hidden
        self.num_tokens, self.rows = num_tokens, rows
        self.compute_dtype = kernel.compute_dtype
        self.all_inputs = None if all_inputs is None else all_inputs.to(self.compute_dtype)
        self._total: torch.Tensor | None = None
        # What a sweep over the logits' gradients has been asked for, and has given
        self._rows: torch.Tensor | None = None
        self._swept: torch.Tensor | None = None
        self.weight, self.bias, self.targets, self.log_z = kernel.weight, kernel.bias, kernel.targets, kernel.log_z
        self.transform = kernel.transform
        self.grad_logprobs = grad_logprobs.to(self.log_z.dtype).contiguous()
        self.segments = Segments(counts, rows // num_tokens)
        # Half-precision products are summed in float32: on a GPU by the product itself, elsewhere from float32 factors
        self.factor_dtype = self.compute_dtype if accelerates(hidden.device) else sum_dtype(hidden)
        self.hidden = hidden.to(self.compute_dtype)
        self.right = self.hidden.to(self.factor_dtype)
        self.dtype = held_dtype(self.right)

    def backward(
        self, form: str | None, needs_bias: bool, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, SequenceGrads | None, torch.Tensor | None]:
        """
        Gradients of the hidden states `(R, H)`, of the weight (`form` of `None`: not needed) and of the bias. Where
        the logits' gradients are not kept, a sweep of `rows`, `(R, c)`, is made along with them.
        """
        k, (vocabulary, size) = len(self.segments.slices), self.weight.shape
        sums = sum_dtype(self.hidden)
        grad_hidden = self.hidden.new_zeros(self.hidden.shape, dtype=sums)
        bias_grads = self.hidden.new_empty((k, vocabulary), dtype=sums) if needs_bias else None
        grads = None
        if form == "dense":
            memory = self.hidden.new_empty((k + 1, vocabulary, size), dtype=self.dtype)
            grads = Dense(memory[:k], owned=True, memory=memory)
        elif form == "factors":
            left = self.hidden.new_empty((len(self.hidden), vocabulary), dtype=self.factor_dtype)
            grads = HeldHeadGrads(self, left)
        elif form in ("recompute", "summed"):
            grads, self._rows = self, rows
            self._swept = None if rows is None else torch.zeros_like(rows)
            self._total = self.hidden.new_empty((vocabulary, size), dtype=sums) if form == "summed" else None

        for start, stop in self._ranges():
            weight = self.weight[start:stop].to(self.compute_dtype)
            dlogits = self.dlogits(start, stop, weight, grads.left[:, start:stop] if form == "factors" else None)
            add_product(grad_hidden, dlogits, weight.to(self.factor_dtype))
            if form == "dense":
                self._products(dlogits).write_rows(grads.grads[:, start:stop], 0, stop - start)
            elif form == "summed":
                self._total[start:stop] = product(dlogits.mT, self.right)
            if self._swept is not None:
                part = HeldFactor(dlogits.unsqueeze(0))
                self._swept += part.times(part.transpose_times(rows))
            if needs_bias:
                bias_grads[:, start:stop] = self.segments.sums(dlogits)
        return grad_hidden, grads, bias_grads

    def dlogits(
        self, start: int, stop: int, weight: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Gradient of the head's products for tokens `start:stop` of the vocabulary, `(R, stop - start)`; in `out`, if
        given. `weight` is the head's for them in the dtype of the products, where it is at hand.
        """
        if weight is None:
            weight = self.weight[start:stop].to(self.compute_dtype)
        in_place = out is not None and out.dtype == self.compute_dtype
        logits = torch.mm(self.hidden, weight.mT, out=out if in_place else None)
        if self.bias is not None:
            logits += self.bias[start:stop].to(self.compute_dtype)
        if not logits_to_gradients(logits, self.targets, self.log_z, self.grad_logprobs, start, self.transform):
            logits = self._gradients(logits, start, stop)
        if out is None:
            return logits.to(self.factor_dtype)
        return out if logits.data_ptr() == out.data_ptr() else out.copy_(logits)

    def _gradients(self, logits: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What TRL's kernel does to logits, where there is none."""
        logits = logits.to(self.log_z.dtype)
        scale, inv_t = self.transform["logit_scale"], self.transform["inv_t"]
        slope = None
        if self.transform["HAS_SOFTCAP"]:
            softcap = self.transform["softcap"]
            capped = torch.tanh(logits.mul_(scale / softcap))
            slope = 1 - capped.square()
            logits = capped.mul_(softcap * inv_t)
        else:
            logits = logits.mul_(scale * inv_t)
        # d log p_target / d z_j = 1[j = target] - p_j
        dlogits = logits.sub_(self.log_z.unsqueeze(-1)).exp_().mul_(-self.grad_logprobs.unsqueeze(-1))
        local = self.targets - start
        inside = (local >= 0) & (local < stop - start)
        dlogits.scatter_add_(
            -1, torch.where(inside, local, 0).unsqueeze(-1), (self.grad_logprobs * inside).unsqueeze(-1)
        )
        if slope is not None:
            dlogits.mul_(slope)
        return dlogits.mul_(scale * inv_t)

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        for a, b in self._ranges(start, stop):
            self._products(self.dlogits(a, b)).add_rows(out[:, a - start : b - start], 0, b - a)

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        for a, b in self._ranges(start, stop):
            self._products(self.dlogits(a, b)).write_rows(out[:, a - start : b - start], 0, b - a)

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        if coefficients is None and self._total is not None:
            return self._total
        out = self.hidden.new_empty(self.weight.shape, dtype=sum_dtype(self.hidden))
        for start, stop in self._ranges():
            out[start:stop] = self._products(self.dlogits(start, stop)).combine(coefficients)
        return out

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        if coefficients is None and self._total is not None:
            total += self._total
            return
        for start, stop in self._ranges():
            self._products(self.dlogits(start, stop)).add_combined(total[start:stop], coefficients)

    def factors(self) -> tuple["HeadFactor", HeldFactor]:
        """The gradients of the logits, and the inputs."""
        inputs = self.all_inputs.view(-1, self.num_tokens, self.all_inputs.shape[-1])
        return HeadFactor(self), HeldFactor(inputs)

    def parts(self) -> Iterator[tuple[int, int, HeldFactor]]:
        """The gradients of the logits, made again by ranges of the vocabulary, with the ranges."""
        for start, stop in self._ranges():
            yield start, stop, HeldFactor(self.dlogits(start, stop).unsqueeze(0))

    def swept(self, rows: torch.Tensor) -> torch.Tensor | None:
        """What the sweep of `rows` in the backward pass gave, if it was of these."""
        return self._swept if rows is self._rows else None

    def _products(self, dlogits: torch.Tensor) -> SegmentProducts:
        return SegmentProducts(dlogits, self.right, self.segments)

    def _ranges(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        stop = len(self.weight) if stop is None else stop
        elements = _TILE_ELEMENTS_ACCELERATED if accelerates(self.hidden.device) else _TILE_ELEMENTS
        step = max(1, elements // max(1, len(self.hidden)))
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


class HeldHeadGrads(SegmentProducts):
    """
    The same with the gradients of the logits in memory.

    Args:
        grads ([`HeadGrads`]): What makes them.
        left (`(R, V)`): The gradients of the logits.
    """

    inputs = "right"

    def __init__(self, grads: HeadGrads, left: torch.Tensor):
        super().__init__(left, grads.right, grads.segments)
        self._grads = grads

    def factors(self) -> tuple["HeadFactor", HeldFactor]:
        """The gradients of the logits, and the inputs."""
        return HeadFactor(self._grads, HeldFactor(self.left.unsqueeze(0))), self._grads.factors()[1]


class HeadFactor:
    """
    The gradients of the logits as a factor, `(R, V)`, made again for each product unless they are held.

    Args:
        grads ([`HeadGrads`]): What makes them.
        held ([`HeldFactor`], *optional*): They, all of the vocabulary.
    """

    source, first_token = None, 0

    def __init__(self, grads: HeadGrads, held: HeldFactor | None = None):
        self.num_tokens, self.rows = grads.num_tokens, grads.rows
        self.dtype, self.operand_dtype = sum_dtype(grads.hidden), grads.factor_dtype
        self._grads = grads
        self._held = held

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        return sum(part.times(columns[start:stop]) for start, stop, part in self._parts())

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.transpose_times(rows) for _, _, part in self._parts()])

    def sweep(self, rows: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self._held is not None:
            return self._held.sweep(rows, between)
        found = self._grads.swept(rows)
        if found is None:
            # One making of the gradients serves both products, at the price of what would be between them
            found = sum(part.times(part.transpose_times(rows)) for _, _, part in self._parts())
        return found

    def norms_sq(self) -> torch.Tensor:
        return sum(part.norms_sq() for _, _, part in self._parts())

    def _parts(self) -> Iterator[tuple[int, int, HeldFactor]]:
        return self._grads.parts() if self._held is None else iter([(0, len(self._grads.weight), self._held)])
