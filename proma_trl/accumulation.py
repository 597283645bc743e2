"""The projected accumulation: ties a model to the sequence gradients of its layers and to the projection.

What autograd accumulates is changed, not how. For each parameter, hooks hold back the ordinary gradient of a backward
pass and emit `sum_i c_i s_i` in its place (see [`projection.solve`]), so that `param.grad` becomes PROMA's accumulated
gradient by the addition that autograd does anyway. All that is read of it is its overlaps with the sequences.

How a layer yields its sequences' gradients is the business of `sequence_grads`. With one sequence a microbatch none of
that is needed: a parameter's gradient is that of the sequence, whatever the architecture.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from .distributed import (
    SCOPES,
    Gradients,
    Scope,
    gradients_for,
    is_distributed,
    reduces_in_backward,
    scope_for,
)
from .projection import ProjectionSettings, Solution, noise_ratio, rank_tolerance, solve
from .sequence_grads.factored import Dense, Rows, SequenceGrads, sum_dtype
from .sequence_grads.layers import ONE_SEQUENCE, Layer, foreign_modules, layer_for
from .sequence_grads.probe import runs_as, whole_shape
from .validation import check_choice, check_real, check_whole

_GIB = 2**30

_SHARDED = (
    "`{}` is used while FSDP holds it in shards, where its sequences' gradients can't be seen. Shard it together with "
    "the modules that run it (`fully_shard` on the whole model), or freeze it."
)

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
        accelerator (`Accelerator`, *optional*):
            What prepares the model. Its `sync_gradients` says where an accumulation ends. Needed with DeepSpeed and
            with a global scope; without it, gradients must accumulate in `param.grad`, as they do on one device, under
            DDP's `no_sync` and under FSDP2's `set_requires_gradient_sync(False)`.
        scope (`str`, defaults to `"local"`):
            `"local"`: each rank projects its own accumulation off its own sequences. `"global"`: all ranks together
            do what one rank would do whose microbatch were the union of theirs.
        accumulator_dtype (`torch.dtype`, defaults to `torch.float32`):
            What a rank's own accumulation is kept in where the backend does not keep it: ZeRO-2, ZeRO-3.

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
        accelerator: Accelerator | None = None,
        scope: str = "local",
        accumulator_dtype: torch.dtype = torch.float32,
    ):
        check_whole("microbatch_size", microbatch_size)
        check_real("memory_budget", memory_budget, "a positive, finite number of GiB", low=sys.float_info.min)
        check_choice("scope", scope, SCOPES)
        if scope == "global" and accelerator is None:
            raise ValueError('`scope="global"` needs the `accelerator`, which says where an accumulation ends.')
        self.model = model
        self.settings = settings or ProjectionSettings()
        self.accelerator = accelerator
        self.scope = scope
        self.accumulator_dtype = accumulator_dtype
        self.microbatch_size = microbatch_size
        self.memory_budget = memory_budget
        self._microbatch: Microbatch | None = None
        self._recording = False
        self._backward_task = -1
        self._handles: list = []
        self._layers: list[Layer] = []
        self._hooked: dict[nn.Parameter, str] = {}
        self._trainable: dict[str, object] = {}
        self._gradients: Gradients | None = None
        self._scope: Scope | None = None
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._statistics: list[torch.Tensor] = []
        self._attach()

    @contextmanager
    def capture(self) -> Iterator[Microbatch]:
        """Record the forward pass of a microbatch. The loss and `backward` come after it."""
        if self._trainable != self._signature():
            self._attach()
        elif not self._innermost():
            self._hook()
        if self._scope is None:
            # Only now, as `accelerator.prepare` may wrap and shard what was given to the constructor
            self._gradients = gradients_for(self.model, self.accelerator)
            self._scope = scope_for(
                self.scope, self._gradients, self.accelerator, self.microbatch_size, self.accumulator_dtype
            )
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
        self._hook_leaves()
        microbatch.advantages = advantages.detach()
        if value is None:
            if objective.dim() == 0:
                raise ValueError("`value` is required where `objective` is a sum over sequences.")
            value = (objective.detach() * microbatch.advantages).sum()
        return _Seed.apply(objective, value.detach(), microbatch)

    def check_sequences(
        self, objective: Callable[[torch.Tensor, Microbatch | None], torch.Tensor], num_sequences: int
    ) -> None:
        """
        Check on a microbatch that the sequence gradients `s_i` are what they should be: for random `r`,
        `sum_i r_i s_i` is the ordinary gradient of `sum_i r_i objective_i`. It takes two forward and backward passes,
        leaves the model's gradients alone, and does nothing with one sequence a microbatch, or where DeepSpeed or FSDP
        reduce gradients within the backward pass.

        Args:
            objective (`Callable`): Runs the forward pass; `objective(weights, microbatch)` returns
                `sum_i weights_i objective_i` for weights of shape `(k,)`. `microbatch` is `None` in an ordinary pass.
            num_sequences (`int`): k.

        Raises:
            RuntimeError: If a parameter's sequence gradients are wrong, with its name.
        """
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.microbatch_size == 1 or num_sequences == 1 or reduces_in_backward(self.model, self.accelerator):
            return
        device = next(iter(params.values())).device
        generator = torch.Generator().manual_seed(0)
        signs = 1 - 2 * torch.randint(2, (num_sequences,), generator=generator)
        weights = (signs * (0.5 + torch.rand(num_sequences, generator=generator))).to(device)
        held = {name: param.grad for name, param in params.items()}

        def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
            for param in params.values():
                param.grad = None
            loss.backward()
            return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in params.items()}

        try:
            # Both passes draw the same random numbers, and those that come after draw what they would have drawn
            with random_numbers_kept(device):
                want = gradients(objective(weights, None))
            with random_numbers_kept(device):
                with self.capture() as microbatch:
                    total = objective(torch.ones_like(weights), microbatch)
                got = gradients(self.loss(total, weights, value=total.detach()))
        finally:
            for name, param in params.items():
                param.grad = held[name]
            if self._scope is not None:
                self._scope.end()
        precision = _coarser(next(iter(params.values())).dtype, microbatch.autocast_dtype)
        wrong = _differing(got, want, precision)
        if wrong:
            shown = ", ".join(f"`{name}`" for name in wrong[:8]) + (f" and {len(wrong) - 8} more" if wrong[8:] else "")
            raise RuntimeError(
                f"The gradients of single sequences are wrong for {shown}: weighted and summed, they are not the "
                "gradient of the weighted sum. A layer mixes the sequences of a microbatch, or orders them in another "
                f"way, or a registered rule is wrong. Train with {ONE_SEQUENCE}, or freeze these parameters."
            )

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
        self._unhook()
        self._layers.clear()
        self._scratch.clear()
        self._microbatch = None
        self._trainable = {}
        self._gradients = self._scope = None

    def _signature(self) -> dict[str, object]:
        # By name, as FSDP exchanges the parameters themselves, and may hold a tied one twice
        trained = {name: param.requires_grad for name, param in self.model.named_parameters(remove_duplicate=False)}
        # Kernels can replace classes or single modules' `forward` after this was made, as Liger's do in `train`
        runs = {layer.name: runs_as(layer.module) for layer in self._layers}
        return {**trained, **runs}

    def _attach(self) -> None:
        previous = _FOLLOWED.get(self.model, lambda: None)()
        if previous is not None and previous is not self:
            previous.detach()
        self._unhook()
        self._layers = self._plan()
        _FOLLOWED[self.model] = weakref.ref(self)
        self._trainable = self._signature()
        self._hook()

    def _plan(self) -> list[Layer]:
        """How each layer with trainable parameters is followed: not at all where the parameters' gradients suffice."""
        if self.microbatch_size == 1:
            return []
        layers: list[Layer] = []
        followed: set[nn.Parameter] = set()
        without_rule = []
        foreign = foreign_modules(self.model)
        for name, module in self.model.named_modules():
            params = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            if not params:
                continue
            layer = foreign.get(module) or layer_for(name, module, tuple(params))
            if isinstance(layer, str):
                line = f"`{name or 'the model itself'}` ({type(module).__name__}): {layer}"
                without_rule.append((params, line))
            else:
                followed.update(params.values())
                layers.append(layer)
        # A module may hold but an alias of a parameter that another layer works with
        refused = [line for params, line in without_rule if not followed.issuperset(params.values())]
        if refused:
            shown = "\n".join(f"  - {line}" for line in refused[:8])
            more = f"\n  - and {len(refused) - 8} more" if len(refused) > 8 else ""
            raise ValueError(
                "PROMA needs the gradient of each sequence in a microbatch, and some layers that hold trainable "
                f"parameters don't yield it:\n{shown}{more}\nEither register a rule for the layer's class "
                f"(`proma_trl.register_rule`, one small function), or train with {ONE_SEQUENCE}, or freeze those "
                "parameters."
            )
        return layers

    def _hook(self) -> None:
        """Register all hooks, inside those that others have registered: ZeRO-3's, which gather and free weights."""
        self._unhook()
        self._handles.append(self.model.register_forward_pre_hook(self._read_shape, with_kwargs=True))
        for layer in self._layers:
            layer.handles = (
                layer.module.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True),
                layer.module.register_forward_hook(
                    partial(self._leave, layer), with_kwargs=True, always_call=True, prepend=True
                ),
            )
            self._handles += layer.handles

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()

    def _innermost(self) -> bool:
        return all(
            next(reversed(layer.module._forward_pre_hooks), None) == layer.handles[0].id
            and next(iter(layer.module._forward_hooks), None) == layer.handles[1].id
            for layer in self._layers
        )

    def _hook_leaves(self) -> None:
        """Hook onto what autograd will give the parameters."""
        hook = self._project_whole if self.microbatch_size == 1 else self._check_emitted
        for name, leaf in self._gradients.leaves():
            if leaf not in self._hooked:
                self._hooked[leaf] = name
                self._handles.append(leaf.register_hook(partial(hook, leaf)))

    # Forward

    def _active(self) -> Microbatch | None:
        """The microbatch at work: one being recorded, or one whose backward pass runs a checkpointed layer again."""
        microbatch = self._microbatch
        runs_again = microbatch is not None and microbatch.backward_runs and torch._C._current_graph_task_id() != -1
        return microbatch if self._recording or runs_again else None

    def _read_shape(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._recording:
            self._microbatch.read_shape(args, kwargs)
            self._microbatch.autocast_dtype = self._autocast_dtype()
        elif (
            self._microbatch is not None and torch._C._current_graph_task_id() == -1 and self._microbatch.backward_runs
        ):
            self._microbatch = None  # an exception broke its backward pass off

    def _autocast_dtype(self) -> torch.dtype | None:
        # Accelerate's autocast begins within the model's forward pass, after its hooks
        prepared = getattr(self.accelerator, "mixed_precision", "no")
        if prepared != "no":
            return torch.float16 if prepared == "fp16" else torch.bfloat16
        device = next(self.model.parameters()).device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

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
        self._scope.begin(microbatch.advantages)
        microbatch.begin_backward()
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_backward, microbatch))

    def _end_backward(self, microbatch: Microbatch) -> None:
        # Parameters with a use that took no part in the loss: autograd is through, so add their gradient here
        for param in [param for param, parts in microbatch.parts.items() if parts]:
            if is_distributed():
                raise RuntimeError(
                    f"A use of `{self._hooked.get(param, 'a parameter')}` in the forward pass has no part in the "
                    "loss, so that its gradient is complete too late to be reduced over ranks. Leave the unused layer "
                    f"out of the forward pass, freeze it, or train with {ONE_SEQUENCE}."
                )
            emission = self._emission(microbatch, param, param)
            param.grad = emission if param.grad is None else param.grad.add_(emission)
        if microbatch.solutions:
            self._statistics.append(_summarize(microbatch.solutions))
        microbatch.solutions.clear()
        microbatch.emitted.clear()
        microbatch.backward_runs = False
        self._microbatch = None
        if self.accelerator is not None and self.accelerator.sync_gradients:
            self._scope.end()

    def _emission(self, microbatch: Microbatch, leaf: nn.Parameter, param: nn.Parameter) -> torch.Tensor:
        """`sum_i c_i s_i` from all uses of `param` that were received, typed as `leaf`, which autograd hands it to."""
        parts = microbatch.parts.pop(param)
        ranges = self._ranges(leaf, whole_shape(param) or (1,))
        with torch.no_grad(), torch.autocast(leaf.device.type, enabled=False):
            if self.settings.removes and self._scope.holds(param):
                precision = _coarser(leaf.dtype, microbatch.autocast_dtype)
                emission, solution = self._project(leaf, param, parts, ranges, microbatch.num_sequences, precision)
                microbatch.solutions.append(solution)
            else:
                emission = _combine(parts, microbatch.advantages.to(leaf.device))
            emission = emission.to(leaf.dtype).view(whole_shape(param))
            self._scope.add(param, emission, ranges)
        microbatch.emitted[param] = emission.data_ptr()
        return emission

    def _ranges(self, leaf: nn.Parameter, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Ranges of the rows of `shape` whose sequence gradients fit the memory budget."""
        row_bytes = self.microbatch_size * math.prod(shape[1:]) * sum_dtype(leaf).itemsize
        step = max(1, int(self.memory_budget * _GIB) // max(1, row_bytes))
        return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def _project(
        self,
        leaf: nn.Parameter,
        param: nn.Parameter,
        parts: list[SequenceGrads],
        ranges: list[tuple[int, int]],
        k: int,
        precision: torch.dtype,
    ) -> tuple[torch.Tensor, Solution]:
        scope, dtype, device = self._scope, sum_dtype(leaf), leaf.device
        shape = whole_shape(param) or (1,)
        acc = scope.local(param)
        compacted = None
        if acc is not None:
            acc = acc.view(shape)
            if all(isinstance(part, Rows) for part in parts) and parts[0].indices.numel() * len(parts) < shape[0]:
                merged = Rows(
                    torch.cat([part.indices for part in parts], 1),
                    torch.cat([part.values for part in parts], 1),
                    shape[0],
                )
                part, compacted = merged.compact()
                parts, acc = [part], acc.index_select(0, compacted)
                ranges = self._ranges(leaf, acc.shape)

        # The exact projection inverts the Gram matrix, whose condition is the square of the sequences'. Float64 makes
        # up for that where it costs nothing and matters: k gradients of a small tensor can nearly be dependent.
        wide = torch.float32 if device.type == "mps" else torch.float64
        small = self.settings.method == "exact" and k * math.prod(shape) <= _SMALL
        gram_dtype = wide if small else dtype
        gram, overlaps = [], []
        for start, stop in ranges:
            grads = self._dense(parts, (k, stop - start, *shape[1:]), device, dtype, start)
            sequences, counterpart = scope.meet(param, acc, grads, start, stop)
            sequences = sequences.to(gram_dtype)
            gram.append(_gram(sequences, wide))
            overlaps.append((sequences @ counterpart.to(gram_dtype)).to(wide))
        sums = scope.total(_total(gram), _total(overlaps), scope.norm_sq(param, dtype).to(wide))
        tolerance = rank_tolerance(len(scope.advantages), gram_dtype, dtype)
        noise = noise_ratio(precision)
        solution = solve(*sums, scope.advantages.to(device, wide), self.settings, tolerance, noise)
        coefficients = scope.own(solution.coefficients).to(dtype)
        if len(ranges) == 1:
            emission = (coefficients @ grads).view(-1, *shape[1:])
        else:
            emission = _combine(parts, coefficients)
        if compacted is not None:
            emission = emission.new_zeros(shape).index_add_(0, compacted, emission)
        return emission, solution

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

    def _project_whole(self, leaf: nn.Parameter, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Leaf hook, one sequence a microbatch: the gradient is that of the sequence."""
        microbatch = self._microbatch
        if grad is None or microbatch is None or not microbatch.backward_runs:
            return grad
        param = self._gradients.owner(leaf)
        if param in microbatch.emitted:
            raise RuntimeError(
                f"The gradient of `{self._hooked[leaf]}` arrives in several parts, as it does where a parameter is "
                "shared and reentrant checkpointing splits the backward pass, or FSDP shards it once for each module. "
                'Set `gradient_checkpointing_kwargs={"use_reentrant": False}`; with FSDP, train with more than one '
                "sequence a microbatch."
            )
        if isinstance(grad, DTensor):
            raise RuntimeError(_SHARDED.format(self._hooked[leaf]))
        microbatch.parts[param].append(Dense(grad.reshape(1, *(grad.shape or (1,)))))
        return self._emission(microbatch, leaf, param)

    def _check_emitted(self, leaf: nn.Parameter, grad: torch.Tensor | None) -> None:
        """Leaf hook: a gradient that didn't come from the recorded uses of a parameter would escape the projection."""
        microbatch = self._microbatch
        if grad is None or microbatch is None or not microbatch.backward_runs:
            return
        if isinstance(grad, DTensor):
            raise RuntimeError(_SHARDED.format(self._hooked[leaf]))
        if microbatch.emitted.get(self._gradients.owner(leaf)) != grad.data_ptr():
            raise RuntimeError(
                f"`{self._hooked[leaf]}` is used outside the forward pass of the layer that holds it, where its "
                f"sequence gradients can't be seen. Train with {ONE_SEQUENCE}, or freeze it."
            )


class Microbatch:
    """
    A forward pass being recorded, and then its backward pass.

    Attributes:
        num_sequences (`int`): k, read from the model's input; 0 until then.
        num_tokens (`int` or `None`): Length T of the input's sequences, where it consists of tokens.
        advantages (`(k,)`): Coefficients of the policy gradient.
        autocast_dtype (`torch.dtype` or `None`): What the forward pass is autocast to.
    """

    def __init__(self, accumulation: ProjectedAccumulation):
        self._accumulation = weakref.ref(accumulation)
        self.num_sequences = 0
        self.num_tokens: int | None = None
        self.advantages: torch.Tensor | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.backward_runs = False
        self.uses: Counter[nn.Parameter] = Counter()
        self.remaining: dict[nn.Parameter, int] = {}
        self.parts: defaultdict[nn.Parameter, list[SequenceGrads]] = defaultdict(list)
        self.emitted: dict[nn.Parameter, int] = {}
        self.solutions: list[Solution] = []

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
        self.uses[self._accumulation()._gradients.owner(param)] += 1

    def head_form(self, param: nn.Parameter, num_positions: int) -> str:
        """How the fused head holds its sequence gradients: dense, as factors, or not at all, as memory allows."""
        accumulation = self._accumulation()
        owner = accumulation._gradients.owner(param)
        rows, size = whole_shape(param)
        held = accumulation._scope.holds(owner)
        budget = accumulation.memory_budget * _GIB / (self.num_sequences * rows * sum_dtype(param).itemsize)
        if size <= budget and held and accumulation.settings.removes:
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
        accumulation = self._accumulation()
        owner = accumulation._gradients.owner(param)
        self.parts[owner].append(grads)
        self.remaining[owner] -= 1
        if self.remaining[owner] > 0:
            return None
        return accumulation._emission(self, param, owner)


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
        part.add_combined(total, coefficients)
    return total


def _gram(grads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`grads @ grads^T` for `(k, n)`, in pieces that stay in cache: k is far too small for one product to be fast."""
    k, n = grads.shape
    pieces = grads.view(k, math.gcd(n, 64), -1).transpose(0, 1)
    return torch.bmm(pieces, pieces.mT).sum(0, dtype=dtype)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """What comes after the context draws the random numbers that it would have drawn without it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def _differing(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], precision: torch.dtype) -> list[str]:
    """Names of gradients that differ by more than rounding, which is large beside a gradient that should be zero."""
    half = torch.finfo(precision).eps > 1e-6
    relative, noise = (0.1, 4e-3) if half else (1e-3, 1e-5)
    norms = torch.stack([grad.norm() for grad in want.values()]).to("cpu", torch.float64)
    errors = torch.stack([(got[name] - grad).norm() for name, grad in want.items()]).to("cpu", torch.float64)
    bounds = relative * norms + noise * norms.max()
    return [name for name, bad in zip(want, (~(errors <= bounds)).tolist(), strict=True) if bad]


def _coarser(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return dtype if other is None else max(dtype, other, key=lambda x: torch.finfo(x).eps)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _summarize(solutions: list[Solution]) -> torch.Tensor:
    """Norm ratio, bounded fraction and overlap of one microbatch, over its tensors, `(3,)`."""
    device = solutions[0].factor.device
    tensors = Solution(*(torch.stack([x.to(device) for x in values]) for values in zip(*solutions, strict=True)))
    removed, accumulated = tensors.removed_sq.sum(), tensors.acc_sq.sum()
    ratio = (removed / accumulated.clamp(min=torch.finfo(removed.dtype).tiny)).sqrt()
    return torch.stack([ratio, tensors.bounded.to(removed.dtype).mean(), tensors.cosine.mean()])
