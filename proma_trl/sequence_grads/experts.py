"""Experts of mixtures, as transformers has them: one module with a 3-D parameter for each of their two linear maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..backends import whole_shape
from ..devices import accelerates
from .forms import Dense, SequenceGrads, sum_dtype
from .layer import ONE_SEQUENCE, Layer, Sink, alias, autocast_dtype, by_sequence, output_tolerance, overflows
from .registry import RuleLayer
from .rerun import RerunRefused

# Elements of the largest matrix of the experts that are worked on at a time (256 MiB in float32)
_BATCH_ELEMENTS = 2**26


@dataclass(frozen=True)
class ExpertFactors:
    """
    Inputs and output gradients of b experts, those from place `first` on, in one of their linear maps. Each expert has
    the tokens that were routed to it, filled up to R.

    Attributes:
        first (`int`): Place of the first expert.
        inputs (`(b, R, d_in)`), grads (`(b, R, d_out)`): Zero where filled up.
        rows (`(b, R)`): Which of the k * T tokens each row is of.
        used (`(b, R)`): Whether it is of any.
        num_tokens (`int`): T.
        transposed (`bool`): Whether the parameter is `(experts, d_in, d_out)` instead of `(experts, d_out, d_in)`.
    """

    first: int
    inputs: torch.Tensor
    grads: torch.Tensor
    rows: torch.Tensor
    used: torch.Tensor
    num_tokens: int
    transposed: bool


class ExpertSink(Sink, Protocol):
    """A [`Sink`] that wants to know what experts were given."""

    def receive_experts(self, param: nn.Parameter, experts: ExpertFactors) -> None:
        """Take the factors of some experts' gradients."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a mixture's experts, as transformers' `use_experts_implementation` describes them."""
    names = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    if not all(hasattr(module, name) for name in names):
        return False
    weights = [getattr(module, name, None) for name in _weight_names(module)]
    return all(isinstance(weight, nn.Parameter) and len(whole_shape(weight)) == 3 for weight in weights)


def _weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


class ExpertsLayer(Layer):
    """
    A mixture's experts. Autograd computes the gradients of their parameters as it always does; in the backward pass,
    the experts run again on their inputs, which gives the inputs and output gradients of both linear maps.
    """

    def __init__(self, name: str, module: nn.Module):
        super().__init__(name, module, ())

    @property
    def matrices(self) -> list[nn.Parameter]:
        weights = (getattr(self.module, name) for name in _weight_names(self.module))
        return [weight for weight in weights if weight.requires_grad]

    def enter(self, sink: Sink, args: tuple, kwargs: dict) -> None:
        self.entered = True

    def exit(self) -> None:
        self.entered = False

    def tells_sequences(self, sink: Sink, args: tuple, kwargs: dict) -> bool:
        hidden, *_ = self._arguments(args, kwargs)
        tokens = hidden.shape[:-1].numel()
        return sink.num_tokens is not None and tokens == sink.num_sequences * sink.num_tokens

    def leave(self, sink: ExpertSink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        return _ExpertsOutput.apply(output, self, sink, *(x.detach() for x in self._arguments(args, kwargs)))

    def factors(
        self, sink: ExpertSink, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor, grad: torch.Tensor
    ) -> Iterator[tuple[nn.Parameter, ExpertFactors]]:
        """The factors of both linear maps, where their weights are trained. Arguments as for [`expert_factors`]."""
        up_name, down_name = _weight_names(self.module)
        for _, up, down in expert_factors(self.module, hidden, index, routing, grad, sink.num_tokens):
            for name, found in ((up_name, up), (down_name, down)):
                weight = getattr(self.module, name)
                if weight.requires_grad:
                    yield weight, found

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = (*args, *kwargs.values())
        return values[0], values[1], values[2]


def expert_factors(
    module: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    routing: torch.Tensor,
    grad: torch.Tensor,
    num_tokens: int,
) -> Iterator[tuple[torch.Tensor, ExpertFactors, ExpertFactors]]:
    """
    Run a mixture's experts again, some at a time.

    Args:
        module (`nn.Module`): The experts.
        hidden (`(k * T, d)`): What they are given.
        index (`(k * T, m)`), routing (`(k * T, m)`): The experts of each token, and their weights.
        grad (`(k * T, d)`): Gradient of the module's output.
        num_tokens (`int`): T.

    Yields:
        What the experts add to the rows of the output, `(b, R, d)`, and the factors of their two linear maps.
    """
    dtype = sum_dtype(grad)
    up_name, down_name = _weight_names(module)
    chosen = index.shape[-1]
    order = index.flatten().argsort(stable=True)
    counts = index.flatten().bincount(minlength=module.num_experts)[: module.num_experts].tolist()
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    longest = max(counts, default=0)
    if longest == 0:
        return
    width = max(getattr(module, name).shape[dim] for name in (up_name, down_name) for dim in (1, 2))
    step = max(1, _BATCH_ELEMENTS // (longest * width))
    places = torch.arange(longest, device=hidden.device)
    for first in range(0, module.num_experts, step):
        some = slice(first, min(first + step, module.num_experts))
        begin = torch.tensor(starts[some], device=hidden.device).unsqueeze(1)
        used = places < torch.tensor(counts[some], device=hidden.device).unsqueeze(1)
        picked = order[torch.where(used, begin + places, 0)]
        rows, kept = picked // chosen, used.unsqueeze(-1)
        share = routing.flatten()[picked].unsqueeze(-1).to(dtype) * kept
        inputs = hidden[rows].to(dtype) * kept
        with torch.enable_grad():
            up = _linear(module, up_name, some, inputs).requires_grad_()
            between = module._apply_gate(up) if module.has_gate else module.act_fn(up)
            down = _linear(module, down_name, some, between)
            output = module.post_expert_norm(down) if module.has_post_expert_norm else down
            of_up, of_down = torch.autograd.grad(output, (up, down), grad[rows].to(dtype) * share)
        common = (rows, used, num_tokens, module.is_transposed)
        yield (
            output.detach() * share,
            ExpertFactors(first, inputs, of_up, *common),
            ExpertFactors(first, between.detach() * kept, of_down, *common),
        )


class ExpertGrads:
    """
    Sequence gradients of one of the experts' linear maps, `(experts, rows, columns)`: of each expert, outer products
    of the tokens that were routed to it.

    Args:
        left (`(n, rows)`), right (`(n, columns)`): Factors, in the order of experts, and among an expert's in that of
            sequences.
        counts (`(experts, k)`): How many of them each expert has of each sequence; on the CPU.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, counts: torch.Tensor):
        self.left, self.right, self.counts = left, right, counts
        self.dtype = left.dtype
        self._starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)

    def write_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        if accelerates(out.device) or out.dtype != self.left.dtype:
            out.copy_(self._products(start, stop))
        else:
            self.add_rows(out.zero_(), start, stop)

    def add_rows(self, out: torch.Tensor, start: int, stop: int) -> None:
        if accelerates(out.device) or out.dtype != self.left.dtype:
            out += self._products(start, stop)
            return
        # Filling up is for devices on which many small products take longer than a large one
        for expert in range(start, stop):
            segments = zip(self._starts[expert].tolist(), self.counts[expert].tolist(), strict=True)
            for i, (first, count) in enumerate(segments):
                if count:
                    rows = slice(first, first + count)
                    out[i, expert - start].addmm_(self.left[rows].mT, self.right[rows])

    def combine(self, coefficients: torch.Tensor | None) -> torch.Tensor:
        experts, k = self.counts.shape
        left = self.left
        if coefficients is not None:
            sequence = torch.arange(k).repeat(experts).repeat_interleave(self.counts.flatten())
            left = left * coefficients.to(left.dtype)[sequence.to(left.device)].unsqueeze(1)
        sizes = self.counts.sum(1).tolist()
        total = left.new_zeros((experts, left.shape[1], self.right.shape[1]))
        for expert, (a, b) in enumerate(zip(left.split(sizes), self.right.split(sizes), strict=True)):
            if len(a):
                torch.mm(a.mT, b, out=total[expert])
        return total

    def add_combined(self, total: torch.Tensor, coefficients: torch.Tensor | None) -> None:
        total += self.combine(coefficients)

    def _products(self, start: int, stop: int) -> torch.Tensor:
        """`(k, stop - start, rows, columns)`, from factors that are filled up to as many for each sequence."""
        counts, starts = (x[start:stop].to(self.left.device).unsqueeze(-1) for x in (self.counts, self._starts))
        places = torch.arange(max(1, int(self.counts[start:stop].max())), device=self.left.device)
        used = places < counts
        picked = torch.where(used, starts + places, 0)
        return ((self.left[picked] * used.unsqueeze(-1)).mT @ self.right[picked]).transpose(0, 1)


class ExpertsRule(RuleLayer):
    """
    A mixture's experts, with the sequence gradients of their parameters. In the backward pass, the experts run again
    on their inputs, all sequences together.
    """

    def __init__(self, name: str, module: nn.Module, param_names: tuple[str, ...]):
        Layer.__init__(self, name, module, param_names)
        self._expected: torch.Tensor | None = None
        self._tolerance = 0.0
        self._checked = False

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [self.params[name] for name in _weight_names(self.module) if name in self.param_names]

    def leave(self, sink: Sink, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if not self._checked:
            self._expected = output.detach()
            self._tolerance = output_tolerance(output.dtype, autocast_dtype(output.device))
        return super().leave(sink, args, kwargs, output)

    def grads(
        self,
        sink: ExpertSink,
        params: dict[str, nn.Parameter],
        inputs: tuple[torch.Tensor, ...],
        grad_output: torch.Tensor,
    ) -> dict[str, SequenceGrads]:
        """
        Raises:
            RerunRefused: If the module computes something else than experts do.
        """
        by_sequence(sink, inputs[0], self.name)
        hidden, index, routing, grad = (x.reshape(-1, x.shape[-1]) for x in (*inputs[:3], grad_output))
        names = _weight_names(self.module)
        found: dict[str, list[ExpertFactors]] = {name: [] for name in names}
        output = torch.zeros_like(grad, dtype=sum_dtype(grad))
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for added, *maps in expert_factors(self.module, hidden, index, routing, grad, sink.num_tokens):
                output.index_add_(0, maps[0].rows.flatten(), added.flatten(0, 1))
                for name, factors in zip(names, maps, strict=True):
                    found[name].append(factors)
                    if name in params:
                        sink.receive_experts(params[name], factors)
            self._check(output)
            return {own: grads for name, parts in found.items() for own, grads in self._of(name, parts, params, sink)}

    def _of(
        self, name: str, parts: list[ExpertFactors], params: dict[str, nn.Parameter], sink: Sink
    ) -> Iterator[tuple[str, SequenceGrads]]:
        """The sequence gradients of one of the linear maps: of its weights and of its biases, if they are trained."""
        k, experts = sink.num_sequences, self.module.num_experts
        # Expert by expert, an expert's in the order of tokens
        inputs = torch.cat([part.inputs[part.used] for part in parts])
        grads = torch.cat([part.grads[part.used] for part in parts])
        places = [torch.arange(p.first, p.first + len(p.rows), device=grads.device).unsqueeze(1) for p in parts]
        segments = torch.cat(
            [(place * k + p.rows // sink.num_tokens)[p.used] for place, p in zip(places, parts, strict=True)]
        )
        if name in params:
            counts = segments.bincount(minlength=experts * k).view(experts, k).cpu()
            yield name, ExpertGrads(*((inputs, grads) if self.module.is_transposed else (grads, inputs)), counts)
        if f"{name}_bias" in params:
            sums = grads.new_zeros((experts * k, grads.shape[1])).index_add_(0, segments, grads)
            yield f"{name}_bias", Dense(sums.view(experts, k, -1).transpose(0, 1).contiguous(), owned=True)

    def _check(self, output: torch.Tensor) -> None:
        if self._expected is None:
            return
        want, self._expected = self._expected.reshape(output.shape), None
        if overflows(want):
            return
        self._checked = True
        if not (output - want).norm() <= self._tolerance * want.norm():
            raise RerunRefused(
                f"`{self.name}` ({type(self.module).__name__}) looks like transformers' experts and computes "
                f"something else. Train with {ONE_SEQUENCE}, freeze its parameters, or register a rule for its class "
                "(`proma_trl.register_rule`).",
                self.module,
            )


def _linear(module: nn.Module, name: str, experts: slice, inputs: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name).detach()[experts].to(inputs.dtype)
    output = inputs @ (weight if module.is_transposed else weight.mT)
    if module.has_bias:
        output = output + getattr(module, f"{name}_bias").detach()[experts].to(inputs.dtype).unsqueeze(1)
    return output


class _ExpertsOutput(torch.autograd.Function):
    """Passes the experts' output on; backward, finds the factors of their gradients before autograd forms these."""

    @staticmethod
    def forward(ctx, output, layer, sink, *tensors):
        ctx.layer, ctx.sink = layer, sink
        ctx.save_for_backward(*tensors)
        return alias(output)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, index, routing = (x.reshape(-1, x.shape[-1]) for x in ctx.saved_tensors)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for param, experts in ctx.layer.factors(ctx.sink, hidden, index, routing, grad):
                ctx.sink.receive_experts(param, experts)
        return grad_output, None, None, None, None, None
