"""The projected accumulation: ties a model to the sequence gradients of its layers and to the projection.

What autograd accumulates is changed, not how. For each parameter, hooks hold back the ordinary gradient of a backward
pass and emit `sum_i c_i s_i` in its place (see [`projection.solve`]), so that `param.grad` becomes PROMA's accumulated
gradient by the addition that autograd does anyway. All that is read of it is its overlaps with the sequences.

How a layer yields its sequences' gradients is the business of `sequence_grads`. With one sequence a microbatch none of
that is needed: a parameter's gradient is that of the sequence, whatever the architecture.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .projection import ProjectionSettings, Solution, rank_tolerance, solve
from .sequence_grads.factored import Dense, Rows, SequenceGrads, sum_dtype
from .sequence_grads.layers import ONE_SEQUENCE, Layer, layer_for

_GIB = 2**30

# Elements of k sequence gradients up to which the exact projection sums in float64 (8 MiB)
_SMALL = 2**20

# The accumulation that follows each model: a second one on the same model takes the place of the first
_FOLLOWED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ProjectedAccumulation]] = weakref.WeakKeyDictionary()


class ProjectedAccumulation:
    """
    Accumulates gradients in `param.grad` by PROMA's rule, for every trainable parameter of a model.

    Args:
        model (`nn.Module`):
            Model whose forward pass takes the microbatch. Its trainable parameters are those that require gradients.
        settings ([`ProjectionSettings`], *optional*):
            What is removed. Defaults to the paper's settings.
        microbatch_size (`int`):
            Largest number of sequences in a microbatch. With `1`, every architecture works.
        memory_budget (`float`, defaults to `0.5`):
            GiB that the sequence gradients of one parameter may take; larger ones are worked on in parts.

    Raises:
        ValueError: If `microbatch_size > 1` and a layer that holds trainable parameters has no rule.

    Example:

    ```python
    accumulation = ProjectedAccumulation(model, microbatch_size=8)
    for microbatch, advantages in microbatches:
        with accumulation.capture():
            log_probs = sequence_log_probs(model, microbatch)  # (8,)
        accumulation.loss(-log_probs, advantages).backward()
    optimizer.step()
    optimizer.zero_grad()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ProjectionSettings | None = None,
        *,
        microbatch_size: int,
        memory_budget: float = 0.5,
    ):
        if microbatch_size < 1:
            raise ValueError(f"`microbatch_size` must be at least 1, got {microbatch_size}.")
        if not memory_budget > 0:
            raise ValueError(f"`memory_budget` must be a positive number of GiB, got {memory_budget}.")
        self.model = model
        self.settings = settings or ProjectionSettings()
        self.microbatch_size = microbatch_size
        self.memory_budget = memory_budget
        self._microbatch: Microbatch | None = None
        self._recording = False
        self._backward_task = -1
        self._handles: list = []
        self._trainable: tuple[bool, ...] = ()
        self._names: dict[nn.Parameter, str] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._statistics: list[torch.Tensor] = []
        self._attach()

    @contextmanager
    def capture(self) -> Iterator[Microbatch]:
        """Record the forward pass of a microbatch. The loss and `backward` come after it."""
        if self._trainable != self._signature():
            self._attach()
        self._microbatch = Microbatch(self)
        self._recording = True
        try:
            yield self._microbatch
        finally:
            self._recording = False

    def loss(
        self, objective: torch.Tensor, advantages: torch.Tensor, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The loss whose `backward` accumulates the captured microbatch.

        Args:
            objective (`(k,)` or scalar):
                What each sequence minimizes at an advantage of one (`-log_probs`, weighted and normalized), or its
                sum over the sequences.
            advantages (`(k,)`):
                `A_i`: the policy gradient is `sum_i A_i d objective_i`.
            value (scalar, *optional*):
                Value to report. Defaults to `sum_i A_i objective_i`; required where `objective` is a sum.

        Returns:
            scalar: `value`, to be scaled as one likes and sent backward.

        Raises:
            ValueError: If shapes don't match the captured microbatch.
            RuntimeError: If no forward pass was captured.
        """
        microbatch = self._microbatch
        if microbatch is None or not microbatch.num_sequences:
            raise RuntimeError(
                "No forward pass was captured: call the model that was given to `ProjectedAccumulation` inside "
                "`with accumulation.capture():` before `accumulation.loss`."
            )
        k = microbatch.num_sequences
        if advantages.shape != (k,):
            raise ValueError(f"`advantages` must hold one number for each of {k} sequences, got {advantages.shape}.")
        if objective.shape not in ((k,), ()):
            raise ValueError(f"`objective` must have shape ({k},) or be a scalar, got {objective.shape}.")
        microbatch.advantages = advantages.detach()
        if value is None:
            if objective.dim() == 0:
                raise ValueError("`value` is required where `objective` is a sum over sequences.")
            value = (objective.detach() * microbatch.advantages).sum()
        return _Seed.apply(objective, value.detach(), microbatch)

    def pop_metrics(self) -> dict[str, float]:
        """
        What the projection did since the last call, averaged over microbatches (first ones of a step, which have
        nothing to remove from, aside). Empty if there were none. The only place that waits for the device.

        Returns:
            `dict`: `norm_ratio`: norm of what was removed over the norm of the accumulated gradient, all tensors
            together; `bounded_fraction`: fraction of tensors whose removal was bounded; `overlap`: mean cosine between
            accumulated gradient and sequence gradients, over sequences and tensors.
        """
        if not self._statistics:
            return {}
        means = torch.stack(self._statistics).mean(0).tolist()
        self._statistics.clear()
        return dict(zip(("norm_ratio", "bounded_fraction", "overlap"), means, strict=True))

    def detach(self) -> None:
        """Remove all hooks: `backward` is ordinary again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._scratch.clear()
        self._microbatch = None
        self._trainable = ()

    def _signature(self) -> tuple[bool, ...]:
        return tuple(param.requires_grad for param in self.model.parameters())

    def _attach(self) -> None:
        previous = _FOLLOWED.get(self.model, lambda: None)()
        if previous is not None:
            previous.detach()
        self.detach()
        _FOLLOWED[self.model] = weakref.ref(self)
        self._trainable = self._signature()
        self._names = {param: name for name, param in self.model.named_parameters() if param.requires_grad}
        self._handles.append(self.model.register_forward_pre_hook(self._read_shape, with_kwargs=True))
        if self.microbatch_size == 1:
            for param in self._names:
                self._handles.append(param.register_hook(partial(self._project_whole, param)))
            return
        followed: set[nn.Parameter] = set()
        without_rule = []
        for name, module in self.model.named_modules():
            params = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            if not params:
                continue
            layer = layer_for(name, module, params)
            if isinstance(layer, str):
                line = f"`{name or 'the model itself'}` ({type(module).__name__}): {layer}"
                without_rule.append((params, line))
            else:
                followed.update(params.values())
                self._handles.append(module.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True))
                self._handles.append(
                    module.register_forward_hook(partial(self._leave, layer), with_kwargs=True, always_call=True)
                )
        # A module may hold but an alias of a parameter that another layer works with
        refused = [line for params, line in without_rule if not followed.issuperset(params.values())]
        if refused:
            self.detach()
            shown = "\n".join(f"  - {line}" for line in refused[:8])
            more = f"\n  - and {len(refused) - 8} more" if len(refused) > 8 else ""
            raise ValueError(
                "PROMA needs the gradient of each sequence in a microbatch, and some layers that hold trainable "
                f"parameters don't yield it:\n{shown}{more}\nEither register a rule for the layer's class "
                f"(`proma_trl.register_rule`, one small function), or train with {ONE_SEQUENCE}, or freeze those "
                "parameters."
            )
        for param in self._names:
            self._handles.append(param.register_hook(partial(self._check_emitted, param)))

    # Forward

    def _active(self) -> Microbatch | None:
        """The microbatch at work: one being recorded, or one whose backward pass runs a checkpointed layer again."""
        microbatch = self._microbatch
        runs_again = microbatch is not None and microbatch.backward_runs and torch._C._current_graph_task_id() != -1
        return microbatch if self._recording or runs_again else None

    def _read_shape(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._recording:
            self._microbatch.read_shape(args, kwargs)
        elif (
            self._microbatch is not None and torch._C._current_graph_task_id() == -1 and self._microbatch.backward_runs
        ):
            self._microbatch = None  # an exception broke its backward pass off

    def _enter(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        microbatch = self._active()
        if microbatch is None:
            return None
        if self._recording:
            for param in layer.params.values():
                microbatch.expect(param)
        # Reentrant checkpointing runs the layer without gradients first, and records it in the backward pass
        return layer.enter(microbatch, args, kwargs) if torch.is_grad_enabled() else None

    def _leave(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output):
        if not layer.entered:
            return None
        # First of all undo what entering did, also where the layer was stopped half way (`output` of `None`)
        layer.exit()
        return None if output is None else layer.leave(self._microbatch, args, kwargs, output)

    # Backward

    def _begin_backward(self, microbatch: Microbatch) -> None:
        running, task = self._microbatch, torch._C._current_graph_task_id()
        if running is not None and running.backward_runs and self._backward_task == task:
            raise RuntimeError(
                "One backward pass holds the losses of two microbatches. Call `backward` on each loss by itself: the "
                "second is projected against what the first has accumulated."
            )
        self._microbatch, self._backward_task = microbatch, task
        microbatch.begin_backward()
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_backward, microbatch))

    def _end_backward(self, microbatch: Microbatch) -> None:
        # Parameters with a use that took no part in the loss: autograd is through, so add their gradient here
        for param in [param for param, parts in microbatch.parts.items() if parts]:
            emission = self._emission(microbatch, param)
            param.grad = emission if param.grad is None else param.grad.add_(emission)
        if microbatch.solutions:
            self._statistics.append(_summarize(microbatch.solutions))
        microbatch.solutions.clear()
        microbatch.emitted.clear()
        microbatch.backward_runs = False
        self._microbatch = None

    def _emission(self, microbatch: Microbatch, param: nn.Parameter) -> torch.Tensor:
        """`sum_i c_i s_i`, shaped and typed as the parameter, from all uses of it that were received."""
        parts = microbatch.parts.pop(param)
        with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
            advantages = microbatch.advantages.to(param.device)
            if param.grad is None or not self.settings.removes:
                emission = _combine(parts, advantages)
            else:
                emission, solution = self._project(param, parts, advantages)
                microbatch.solutions.append(solution)
            emission = emission.to(param.dtype).view_as(param)
        microbatch.emitted[param] = emission.data_ptr()
        return emission

    def _project(
        self, param: nn.Parameter, parts: list[SequenceGrads], advantages: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[Solution, torch.Tensor]]:
        dtype = sum_dtype(param)
        acc = param.grad.view(param.shape or (1,))
        acc_sq = torch.linalg.vector_norm(acc, dtype=dtype).square()
        compacted = None
        if all(isinstance(part, Rows) for part in parts) and parts[0].indices.numel() * len(parts) < len(acc):
            merged = Rows(
                torch.cat([part.indices for part in parts], 1), torch.cat([part.values for part in parts], 1), len(acc)
            )
            part, compacted = merged.compact()
            parts, full, acc = [part], acc, acc.index_select(0, compacted)

        k, rows = len(advantages), len(acc)
        row_bytes = k * acc[0].numel() * dtype.itemsize
        step = min(rows, max(1, int(self.memory_budget * _GIB) // max(1, row_bytes)))
        # The exact projection inverts the Gram matrix, whose condition is the square of the sequences'. Float64 makes
        # up for that where it costs nothing and matters: k gradients of a small tensor can nearly be dependent.
        small = self.settings.method == "exact" and k * acc.numel() <= _SMALL and acc.device.type != "mps"
        gram_dtype = torch.float64 if small else dtype
        gram = acc.new_zeros((k, k), dtype=gram_dtype)
        overlaps = acc.new_zeros(k, dtype=gram_dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            grads = self._dense(parts, (k, stop - start, *acc.shape[1:]), acc.device, dtype, start)
            factors = grads.to(gram_dtype)
            gram += _gram(factors)
            overlaps += factors @ acc[start:stop].flatten().to(gram_dtype)

        wide = torch.float32 if acc.device.type == "mps" else torch.float64
        solution = solve(
            gram.to(wide),
            overlaps.to(wide),
            acc_sq.to(wide),
            advantages.to(wide),
            self.settings,
            rank_tolerance(k, gram_dtype, dtype),
        )
        coefficients = solution.coefficients.to(dtype)
        if step == rows:
            emission = (coefficients @ grads).view_as(acc)
        else:
            emission = _combine(parts, coefficients)
        if compacted is not None:
            emission = torch.zeros_like(full, dtype=dtype).index_add_(0, compacted, emission)
        return emission, (solution, acc_sq)

    def _dense(
        self, parts: list[SequenceGrads], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, start: int
    ) -> torch.Tensor:
        """The `shape[1]` rows from `start` of all sequence gradients, `(k, n)`."""
        first, rest = parts[0], parts[1:]
        stop = start + shape[1]
        if isinstance(first, Dense) and first.grads.dtype == dtype and (first.owned or not rest):
            out = first.grads[:, start:stop]
        else:
            out = self._buffer(shape, device, dtype)
            first.write_rows(out, start, stop)
        for part in rest:
            part.add_rows(out, start, stop)
        return out.flatten(1)

    def _buffer(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if device.type != "cpu":  # their allocators keep freed memory at hand
            return torch.empty(shape, device=device, dtype=dtype)
        # On a CPU, fresh memory costs as much as the products that go there, so one buffer serves all parameters
        size = math.prod(shape)
        buffer = self._scratch.get(dtype)
        if buffer is None or len(buffer) < size:
            self._scratch.pop(dtype, None)
            self._scratch[dtype] = buffer = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def _project_whole(self, param: nn.Parameter, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Leaf hook, one sequence a microbatch: the gradient is that of the sequence."""
        microbatch = self._microbatch
        if grad is None or microbatch is None or not microbatch.backward_runs:
            return grad
        if param in microbatch.emitted:
            raise RuntimeError(
                f"The gradient of `{self._names[param]}` arrived in several parts, as it does where reentrant "
                "checkpointing splits the backward pass and a parameter is shared. Set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        microbatch.parts[param].append(Dense(grad.reshape(1, *(grad.shape or (1,)))))
        return self._emission(microbatch, param)

    def _check_emitted(self, param: nn.Parameter, grad: torch.Tensor | None) -> None:
        """Leaf hook: a gradient that didn't come from the recorded uses of a parameter would escape the projection."""
        microbatch = self._microbatch
        if grad is None or microbatch is None or not microbatch.backward_runs:
            return
        if microbatch.emitted.get(param) != grad.data_ptr():
            raise RuntimeError(
                f"`{self._names[param]}` is used outside the forward pass of the layer that holds it, where its "
                f"sequence gradients can't be seen. Train with {ONE_SEQUENCE}, or freeze it."
            )


class Microbatch:
    """
    A forward pass being recorded, and then its backward pass.

    Attributes:
        num_sequences (`int`): k, read from the model's input; 0 until then.
        num_tokens (`int` or `None`): Length T of the input's sequences, where it consists of tokens.
        advantages (`(k,)`): Coefficients of the policy gradient.
    """

    def __init__(self, accumulation: ProjectedAccumulation):
        self._accumulation = weakref.ref(accumulation)
        self.num_sequences = 0
        self.num_tokens: int | None = None
        self.advantages: torch.Tensor | None = None
        self.backward_runs = False
        self.uses: Counter[nn.Parameter] = Counter()
        self.remaining: dict[nn.Parameter, int] = {}
        self.parts: defaultdict[nn.Parameter, list[SequenceGrads]] = defaultdict(list)
        self.emitted: dict[nn.Parameter, int] = {}
        self.solutions: list[tuple[Solution, torch.Tensor]] = []

    def read_shape(self, args: tuple, kwargs: dict) -> None:
        """Take k and T from the model's input. Raises `ValueError` if it has more sequences than declared."""
        value = kwargs.get("input_ids")
        value = kwargs.get("inputs_embeds") if value is None else value
        if value is None:
            value = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim() > 0), None)
        if value is None:
            raise ValueError("The model was called without a tensor, so that its number of sequences is unknown.")
        k = value.shape[0]
        is_tokens = (value.dim() == 2 and not value.is_floating_point()) or value.dim() == 3
        size = self._accumulation().microbatch_size
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
        self.num_sequences, self.num_tokens = k, value.shape[1] if is_tokens else None

    def expect(self, param: nn.Parameter) -> None:
        self.uses[param] += 1

    def head_form(self, param: nn.Parameter, num_positions: int) -> str:
        """How the fused head holds its sequence gradients: dense, as factors, or not at all, as memory allows."""
        accumulation = self._accumulation()
        rows, size = param.shape
        budget = accumulation.memory_budget * _GIB / (self.num_sequences * rows * sum_dtype(param).itemsize)
        if size <= budget and param.grad is not None and accumulation.settings.removes:
            return "dense"
        return "factors" if num_positions <= budget else "recompute"

    def begin_backward(self) -> None:
        self.backward_runs = True
        self.remaining = dict(self.uses)
        self.parts.clear()
        self.emitted.clear()
        self.solutions.clear()

    def receive(self, param: nn.Parameter, grads: SequenceGrads) -> torch.Tensor | None:
        """Take the sequence gradients of one use; at the last use, return what all of them amount to."""
        if not self.backward_runs:
            raise RuntimeError(
                "A captured forward pass was sent backward without `accumulation.loss`, so that its advantages are "
                "unknown. Pass the objective through `accumulation.loss` and call `backward` on what it returns."
            )
        self.parts[param].append(grads)
        self.remaining[param] -= 1
        if self.remaining[param] > 0:
            return None
        return self._accumulation()._emission(self, param)


class _Seed(torch.autograd.Function):
    """The loss: its value is the true one, its backward pass starts every sequence with weight one."""

    @staticmethod
    def forward(ctx, objective: torch.Tensor, value: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        ctx.microbatch, ctx.shape = microbatch, objective.shape
        return value.to(objective.dtype).clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        microbatch = ctx.microbatch
        microbatch._accumulation()._begin_backward(microbatch)
        return grad_output.expand(ctx.shape), None, None


def _combine(parts: list[SequenceGrads], coefficients: torch.Tensor) -> torch.Tensor:
    """`sum_i coefficients_i s_i` over all uses of a parameter."""
    total = parts[0].combine(coefficients)
    for part in parts[1:]:
        total += part.combine(coefficients)
    return total


def _gram(grads: torch.Tensor) -> torch.Tensor:
    """`grads @ grads^T` for `(k, n)`, in pieces that stay in cache: k is far too small for one product to be fast."""
    k, n = grads.shape
    pieces = grads.view(k, math.gcd(n, 64), -1).transpose(0, 1)
    return torch.bmm(pieces, pieces.mT).sum(0)


def _summarize(solutions: list[tuple[Solution, torch.Tensor]]) -> torch.Tensor:
    """Norm ratio, bounded fraction and overlap of one microbatch, over its tensors, `(3,)`."""
    device = solutions[0][0].removed_sq.device
    rows = [
        torch.stack([s.removed_sq, acc_sq.to(s.removed_sq), s.bounded.to(s.removed_sq), s.cosine]).to(device)
        for s, acc_sq in solutions
    ]
    removed, accumulated, bounded, cosine = torch.stack(rows, 1)
    ratio = (removed.sum() / accumulated.sum().clamp(min=torch.finfo(removed.dtype).tiny)).sqrt()
    return torch.stack([ratio, bounded.mean(), cosine.mean()])
