"""TRL's fused LM head: log-probabilities of the sampled tokens straight from hidden states and the head's weight.

The head never runs as a module, and neither the (k, T, V) logits nor their gradients are held: both are computed
again, a range of the vocabulary at a time. The forward pass is TRL's own kernel; the backward pass is ours, since the
weight's gradient is needed for each sequence, `s_i = sum_t dlogits_it h_it^T`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from ..devices import accelerates
from ..sequence_grads.forms import Dense, HeldFactor, OuterProducts, SequenceGrads, product, sum_dtype
from ..sequence_grads.layer import Sink
from .trl_internals import gathered_head, kernel_forward, kernel_state, replaced_kernel

# Elements of one range of logits: (k T) x (range of the vocabulary), 32 MiB in float32
_TILE_ELEMENTS = 2**23


class HeadSink(Sink, Protocol):
    """
    A [`Sink`] that also says how to hold the sequence gradients of the largest tensor of all.

    Attributes:
        projects_inputs (`bool`): Whether Intra-PROMA acts, to which the inputs of all tokens matter.
    """

    projects_inputs: bool

    def head_form(self, param: nn.Parameter, num_positions: int) -> str:
        """`"dense"`, `"factors"`, `"recompute"` or `"summed"`, for `num_positions` scored positions a sequence."""

    def head_rows(self, param: nn.Parameter, first: int, length: int) -> torch.Tensor | None:
        """What the gradients of the logits are multiplied by first, if at all, for a sweep over them: `(k * N, c)`."""


@contextmanager
def sequence_head(sink: HeadSink, num_completion_tokens: int) -> Iterator[None]:
    """
    Within the context, TRL's fused LM head yields sequence gradients to `sink`.

    Args:
        sink ([`HeadSink`]): What receives them.
        num_completion_tokens (`int`): Only so many last positions are scored. TRL discards the others.
    """

    class Head:
        @staticmethod
        def apply(hidden, weight, bias, targets, *settings):
            # Not compacted, positions are those of all sequences but for the last token: (k * (T - 1), H)
            k = sink.num_sequences
            inputs = hidden.view(k, -1, hidden.shape[-1])
            hidden = inputs[:, -num_completion_tokens:]
            targets = targets.view(k, -1)
            skipped = targets.shape[1] - hidden.shape[1]
            targets = targets[:, skipped:].flatten()
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                all_inputs = inputs.detach() if sink.projects_inputs else None
                scored = _SequenceLogProbs.apply(hidden, weight, bias, targets, settings, sink, all_inputs)
            else:
                scored = original.apply(hidden.flatten(0, 1), weight, bias, targets, *settings)
            return tuple(
                None if x is None else nn.functional.pad(x.view(k, -1), (skipped, 0)).flatten() for x in scored
            )

    with replaced_kernel(Head) as original:
        yield


class _SequenceLogProbs(torch.autograd.Function):
    """TRL's `ChunkedLogProbFunction`, on hidden states `(k, N, H)`, whose backward pass keeps sequences apart."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings, sink, all_inputs):
        flat = hidden.flatten(0, 1)
        outputs = kernel_forward(ctx, flat, weight, bias, targets, *settings)
        ctx.params, ctx.sink, ctx.num_sequences, ctx.all_inputs = (weight, bias), sink, len(hidden), all_inputs
        for param in ctx.params:
            if param is not None and param.requires_grad:
                sink.expect(param)
        return outputs

    @staticmethod
    def backward(ctx, grad_logprobs, *_):
        # Entropy bonuses are refused, so only log-probabilities have gradients
        kernel = kernel_state(ctx)
        hidden, weight, bias = kernel.hidden, kernel.weight, kernel.bias
        weight_param, bias_param = ctx.params
        k = ctx.num_sequences
        needs_weight, needs_bias = weight.requires_grad, bias is not None and bias.requires_grad
        with gathered_head(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            head = HeadGrads(
                hidden.view(k, -1, hidden.shape[-1]),
                weight,
                bias,
                kernel.targets.view(k, -1),
                kernel.log_z.view(k, -1),
                grad_logprobs.view(k, -1),
                kernel.compute_dtype,
                kernel.transform,
                ctx.all_inputs,
            )
            form = ctx.sink.head_form(weight_param, head.hidden.shape[1]) if needs_weight else None
            rows = ctx.sink.head_rows(weight_param, head.first_token, head.num_tokens) if needs_weight else None
            grad_hidden, grads, bias_grads = head.backward(form, needs_bias, rows)
            grad_weight = ctx.sink.receive(weight_param, grads) if needs_weight else None
            grad_bias = ctx.sink.receive(bias_param, Dense(bias_grads)) if needs_bias else None
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


class HeadGrads:
    """
    The head weight's sequence gradients, as a form that is recomputed: the gradients of the logits, which they are the
    products of, are made again for any range of the vocabulary.

    Args:
        hidden (`(k, N, H)`), weight (`(V, H)`), bias (`(V,)` or `None`): What the head multiplies.
        targets (`(k, N)`): Sampled tokens.
        log_z (`(k, N)`): Log of the sum of exponentiated logits.
        grad_logprobs (`(k, N)`): Gradient of the tokens' log-probabilities.
        compute_dtype (`torch.dtype`): Dtype of the products, as in the forward pass.
        transform (`dict`): TRL's `logit_scale`, `softcap`, `inv_t` and `HAS_SOFTCAP`.
        all_inputs (`(k, N', H)`, *optional*): Hidden states of all tokens, of which `hidden` has the last N.
    """

    inputs = "right"

    def __init__(self, hidden, weight, bias, targets, log_z, grad_logprobs, compute_dtype, transform, all_inputs=None):
        self.num_tokens = hidden.shape[1]
        self.first_token = 0 if all_inputs is None else all_inputs.shape[1] - self.num_tokens
        self.all_inputs = None if all_inputs is None else all_inputs.to(compute_dtype)
        self._total: torch.Tensor | None = None
        # What a sweep over the logits' gradients has been asked for, and has given
        self._rows: torch.Tensor | None = None
        self._swept: torch.Tensor | None = None
        self.hidden = hidden.to(compute_dtype)
        self.weight = weight
        self.bias = bias
        self.targets = targets
        self.log_z = log_z
        self.grad_logprobs = grad_logprobs.to(log_z.dtype)
        self.compute_dtype = compute_dtype
        self.transform = transform
        # Half-precision products are summed in float32: on CUDA by the product itself, elsewhere from float32 factors
        self.factor_dtype = compute_dtype if accelerates(hidden.device) else sum_dtype(hidden)

    def backward(
        self, form: str | None, needs_bias: bool, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, SequenceGrads | None, torch.Tensor | None]:
        """
        Gradients of the hidden states `(k, N, H)`, of the weight (`form` of `None`: not needed) and of the bias. Where
        the logits' gradients are not kept, a sweep of `rows`, `(k * N, c)`, is made along with them.
        """
        k, length, size = self.hidden.shape
        vocabulary = len(self.weight)
        sums = sum_dtype(self.hidden)
        grad_hidden = self.hidden.new_zeros((k * length, size), dtype=sums)
        bias_grads = self.hidden.new_empty((k, vocabulary), dtype=sums) if needs_bias else None
        hidden = self.hidden.to(self.factor_dtype)
        grads = None
        if form == "dense":
            grads = Dense(self.hidden.new_empty((k, vocabulary, size), dtype=sums), owned=True)
        elif form == "factors":
            left = self.hidden.new_empty((k, length, vocabulary), dtype=self.factor_dtype)
            grads = OuterProducts(left, hidden, all_inputs=self.all_inputs)
        elif form in ("recompute", "summed"):
            grads, self._rows = self, rows
            self._swept = None if rows is None else torch.zeros_like(rows)
            self._total = self.hidden.new_empty((vocabulary, size), dtype=sums) if form == "summed" else None

        for start, stop in self._ranges():
            dlogits = self.dlogits(start, stop)
            _add_product(grad_hidden, dlogits.flatten(0, 1), self.weight[start:stop].to(self.factor_dtype))
            if form == "dense":
                OuterProducts(dlogits, hidden).write_rows(grads.grads[:, start:stop], 0, stop - start)
            elif form == "factors":
                grads.left[:, :, start:stop] = dlogits
            elif form == "summed":
                self._total[start:stop] = product(dlogits.flatten(0, 1).mT, hidden.flatten(0, 1))
            if self._swept is not None:
                part = HeldFactor(dlogits)
                self._swept += part.times(part.transpose_times(rows))
            if needs_bias:
                bias_grads[:, start:stop] = dlogits.sum(1, dtype=sums)
        return grad_hidden.view(k, length, size), grads, bias_grads

    def dlogits(self, start: int, stop: int) -> torch.Tensor:
        """Gradient of the head's products for tokens `start:stop` of the vocabulary, `(k, N, stop - start)`."""
        weight = self.weight[start:stop].to(self.compute_dtype)
        logits = self.hidden.flatten(0, 1) @ weight.mT
        if self.bias is not None:
            logits += self.bias[start:stop].to(self.compute_dtype)
        logits = logits.view(*self.hidden.shape[:2], -1).to(self.log_z.dtype)
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
        return dlogits.mul_(scale * inv_t).to(self.factor_dtype)

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        for a, b in self._ranges(start, stop):
            part = OuterProducts(self.dlogits(a, b), self.hidden.to(self.factor_dtype))
            part.add_rows(out[:, a - start : b - start], 0, b - a)

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        self.add_rows(out.zero_(), start, stop)

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        if coefficients is None and self._total is not None:
            return self._total
        size = self.hidden.shape[-1]
        out = self.hidden.new_empty((len(self.weight), size), dtype=sum_dtype(self.hidden))
        for start, stop in self._ranges():
            part = OuterProducts(self.dlogits(start, stop), self.hidden.to(self.factor_dtype))
            out[start:stop] = part.combine(coefficients)
        return out

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        if coefficients is None and self._total is not None:
            total += self._total
            return
        for start, stop in self._ranges():
            part = OuterProducts(self.dlogits(start, stop), self.hidden.to(self.factor_dtype))
            part.add_combined(total[start:stop], coefficients)

    def factors(self) -> tuple["HeadFactor", HeldFactor]:
        """The gradients of the logits, and the inputs."""
        return HeadFactor(self), HeldFactor(self.hidden if self.all_inputs is None else self.all_inputs)

    def parts(self) -> Iterator[tuple[int, int, HeldFactor]]:
        """The gradients of the logits, made again by ranges of the vocabulary, with the ranges."""
        for start, stop in self._ranges():
            yield start, stop, HeldFactor(self.dlogits(start, stop))

    def swept(self, rows: torch.Tensor) -> torch.Tensor | None:
        """What the sweep of `rows` in the backward pass gave, if it was of these."""
        return self._swept if rows is self._rows else None

    def _ranges(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        stop = len(self.weight) if stop is None else stop
        step = max(1, _TILE_ELEMENTS // self.targets.numel())
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


class HeadFactor:
    """
    The gradients of the logits as a factor, `(k, N, V)`, made again for each product.

    Args:
        grads ([`HeadGrads`]): What makes them.
    """

    source = None

    def __init__(self, grads: HeadGrads):
        self.num_tokens, self.first_token = grads.num_tokens, grads.first_token
        self.dtype = sum_dtype(grads.hidden)
        self._grads = grads

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        return sum(part.times(columns[start:stop]) for start, stop, part in self._grads.parts())

    def transpose_times(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.transpose_times(rows) for _, _, part in self._grads.parts()])

    def sweep(self, rows: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        found = self._grads.swept(rows)
        if found is None:
            # One making of the gradients serves both products, at the price of what would be between them
            found = sum(part.times(part.transpose_times(rows)) for _, _, part in self._grads.parts())
        return found

    def norms_sq(self) -> torch.Tensor:
        return sum(part.norms_sq() for _, _, part in self._grads.parts())


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
