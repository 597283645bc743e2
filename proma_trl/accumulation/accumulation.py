"""`ProjectedAccumulation`: a model, an update rule, and the loop between them.

What autograd accumulates is changed, not how. For each parameter, the ordinary gradient of a backward pass is replaced
by `sum_i c_i s_i`, so that `param.grad` becomes the rule's accumulated gradient by the addition that autograd does
anyway. The package's README follows one parameter tensor through a backward pass.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backends import Backend, all_zero, backend_for, is_distributed
from ..devices import default_memory_budget
from ..intra import IntraPROMA
from ..intra.intra_proma import check_intra
from ..rules import PROMA, REINFORCE, UpdateRule
from ..sequence_grads import head_weights, plan_layers, plan_linear_layers
from ..sequence_grads.layer import Layer
from ..sequence_grads.rerun import RerunRefused
from ..sequence_grads.tensor import Scratch
from ..torch_internals import backward_id, backward_runs, contents
from ..validation import check_choice, check_real, check_trained, check_whole
from .accumulators import SCOPES, Accumulator, accumulator_for
from .captured_loss import CapturedLoss, StartBackward
from .emission import Engine, needs_sequences
from .hooks import ModelHooks
from .microbatch import NOT_CAPTURED, Microbatch, Phase
from .sequence_check import WrongSequences, check_sequences

_RULE, _STEP = "rule", "step"


class ProjectedAccumulation:
    """
    Accumulates gradients in `param.grad` by an update rule, for every trainable parameter of a model.

    Args:
        model (`nn.Module`):
            Model whose forward pass takes the microbatch. Its trainable parameters are those that require gradients.
        rule ([`UpdateRule`], *optional*):
            From a tensor's inner products to coefficients. Defaults to [`PROMA`] with the paper's settings.
        microbatch_size (`int`):
            Largest number of sequences in a microbatch. With `1`, every architecture works.
        memory_budget (`float`, *optional*):
            GiB that the sequence gradients of one parameter may take; larger ones are worked on in parts. Defaults to
            an eighth of a GPU's memory, and to 0.5 elsewhere.
        accelerator (`Accelerator`, *optional*):
            What prepares the model. Its `sync_gradients` says where an accumulation ends. Needed with DeepSpeed and
            with a global scope; without it, gradients must accumulate in `param.grad`, as they do on one device, under
            DDP's `no_sync` and under FSDP2's `set_requires_gradient_sync(False)`.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Without an `accelerator`, whose steps end an accumulation. If neither is given, one is over when gradients
            have been cleared (`optimizer.zero_grad()`), or [`~ProjectedAccumulation.end_step`] was called.
        scope (`str`, defaults to `"local"`):
            `"local"`: each rank's rule sees its own accumulation and sequences. `"global"`: all ranks together do what
            one rank would do whose microbatch were the union of theirs.
        accumulator_dtype (`torch.dtype`, defaults to `torch.float32`):
            What a rank's own accumulation is kept in where the backend does not keep it: ZeRO-2, ZeRO-3.
        intra_dim (`int`, defaults to `0`):
            Intra-PROMA: dimension of the subspaces that the gradient of a linear layer's weight is projected off
            before the rule acts; see [`IntraPROMA`] for this and the next four. `0` for none. With the rule
            [`REINFORCE`], every architecture works.
        intra_power_iterations (`int`, defaults to `1`):
            Number of power iterations that find the subspaces.
        intra_strength (`float`, defaults to `1.0`):
            Part of the gradient within the subspaces that is removed.
        intra_target (`str`, defaults to `"microbatch"`):
            Which gradient is projected: the `"microbatch"`'s, or what has been `"accumulated"` before it.
        intra_head (`bool`, defaults to `True`):
            Whether the weight of the LM head is projected.
        seed (`int`, defaults to `0`):
            Seed of Intra-PROMA's random numbers, which are its own.

    Raises:
        ValueError: If an argument is out of range; if `microbatch_size > 1`, the rule is not plain, and a layer that
            holds trainable parameters has no rule for its sequence gradients; or with Intra-PROMA and a global scope,
            unless the rule is plain.
        TypeError: If `rule` is no [`UpdateRule`], or `optimizer` no optimizer.

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
        rule: UpdateRule | None = None,
        *,
        microbatch_size: int,
        memory_budget: float | None = None,
        accelerator: Accelerator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scope: str = "local",
        accumulator_dtype: torch.dtype = torch.float32,
        intra_dim: int = 0,
        intra_power_iterations: int = 1,
        intra_strength: float = 1.0,
        intra_target: str = "microbatch",
        intra_head: bool = True,
        seed: int = 0,
    ):
        check_whole("microbatch_size", microbatch_size)
        if memory_budget is not None:
            check_real("memory_budget", memory_budget, "a positive, finite number of GiB", low=sys.float_info.min)
        check_choice("scope", scope, SCOPES)
        if scope == "global" and accelerator is None:
            raise ValueError('`scope="global"` needs the `accelerator`, which says where an accumulation ends.')
        if not isinstance(rule, UpdateRule | None):
            raise TypeError(f"`rule` must be an `UpdateRule`, such as `PROMA()`, got {rule!r}.")
        check_trained(model)
        self.model = model
        self.rule = PROMA() if rule is None else rule
        self.microbatch_size = microbatch_size
        self.memory_budget = memory_budget
        if accelerator is not None and optimizer is not None:
            raise ValueError(
                "`optimizer` has no effect with an `accelerator`, which says where an accumulation ends. Pass one."
            )
        if not isinstance(optimizer, torch.optim.Optimizer | None):
            raise TypeError(f"`optimizer` must be a `torch.optim.Optimizer`, got {type(optimizer).__name__}.")
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.scope = scope
        self.accumulator_dtype = accumulator_dtype
        check_intra(intra_dim, intra_power_iterations, intra_strength, intra_target, intra_head, prefix="intra_")
        intra = IntraPROMA(intra_dim, intra_power_iterations, intra_strength, intra_target, intra_head)
        self.intra = intra if intra.removes else None
        self.seed = seed
        if self.intra is not None and scope == "global" and (not self.rule.is_plain or intra.target == "accumulated"):
            raise ValueError(
                "Intra-PROMA projects each rank's gradient by itself, and can't be combined with a rule, or a target, "
                'of a global scope. Set `scope="local"`.'
            )
        self._captured: Microbatch | None = None
        self._running: Microbatch | None = None
        self._backend: Backend | None = None
        self._accumulator: Accumulator | None = None
        self._scratch = Scratch()
        self._metrics: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._step_began = False
        # The microbatch's place in the run, of which Intra-PROMA's random numbers are a function
        self._step = self._index = 0
        # Modules whose parents run again in their place
        self._with_parents: set[nn.Module] = set()
        # What parameters and their gradients were after the last microbatch, in a loop without an accelerator
        self._left: dict[nn.Parameter, tuple] = {}
        self._hooks = self._new_hooks()
        self._step_handle: RemovableHandle | None = None
        self._follow_optimizer()

    @contextmanager
    def capture(self) -> Iterator[Microbatch]:
        """
        Record the forward pass of a microbatch. The loss and `backward` come after it.

        Raises:
            RuntimeError: Within another `capture()`.
        """
        with self._capture(self.rule) as microbatch:
            yield microbatch

    def loss(
        self,
        objective: torch.Tensor,
        advantages: torch.Tensor,
        value: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The loss whose `backward` accumulates the captured microbatch.

        Args:
            objective (`(k,)` or scalar):
                What each sequence minimizes at an advantage of one (`-log_probs`, weighted and normalized), or the
                sum over the sequences.
            advantages (`(k,)`):
                `A_i`: the policy gradient is `sum_i A_i d objective_i`.
            value (scalar, *optional*):
                Value to report. Defaults to `sum_i A_i objective_i`; required where `objective` is a sum.
            weights (`(k,)`, *optional*):
                What the sequences of a sum were multiplied by: `sequence_weights(advantages)`. Defaults to one.
                Required with Intra-PROMA alone, whose backward pass is that of the sum, if k > 1.

        Returns:
            scalar: `value`, to be scaled as one likes and sent backward. Its `backward` raises a `RuntimeError` if a
            term was added to it that has a gradient for the model's parameters.

        Raises:
            ValueError: If shapes don't match the captured microbatch, or a sum is not weighted as the method needs it.
            RuntimeError: If no forward pass was captured, or it has been sent backward already.
        """
        microbatch = self._captured
        if microbatch is None:
            raise RuntimeError(NOT_CAPTURED)
        microbatch.weigh(advantages)
        k = microbatch.num_sequences
        if objective.shape not in ((k,), ()):
            raise ValueError(f"`objective` must have shape ({k},) or be a scalar, got {objective.shape}.")
        if value is None:
            if objective.dim() == 0:
                raise ValueError("`value` is required where `objective` is a sum over sequences.")
            value = (objective.detach() * microbatch.advantages).sum()
        remaining = self._weights_left(microbatch, objective, weights)
        self._hooks.hook_leaves(self._backend)
        loss = StartBackward.apply(objective, value.detach(), microbatch, remaining)
        # Another class of tensors, such as those without data, keeps its own
        return loss.as_subclass(CapturedLoss) if type(loss) is torch.Tensor else loss

    def sequence_weights(self, advantages: torch.Tensor) -> torch.Tensor:
        """
        With what sequences are weighted in a backward pass, `(k,)`: one; or, with Intra-PROMA alone, their advantages,
        and a tiny number where these are zero.
        """
        weights = self._engine(self.rule).sequence_weights(advantages.detach())
        return torch.ones_like(advantages) if weights is None else weights

    @property
    def name(self) -> str:
        """What the method is called, of which `state_dict` returns the state."""
        return self.rule.name if self.intra is None else f"{self.intra.name} and {self.rule.name}"

    @property
    def begins_step(self) -> bool:
        """Whether nothing has been accumulated in the current optimizer step."""
        return self._index == 0

    @property
    def follows_head(self) -> bool:
        """Whether the LM head, if it does not run as a module, must hand over its gradients."""
        if self.rule.is_plain or self.microbatch_size == 1:
            return any(self._hooks.follows(weight) for weight in head_weights(self.model))
        return True

    def rerun_names(self) -> list[str]:
        """
        Names of the modules that have no rule, and so run again in the backward pass for the sequence gradients of
        their parameters.
        """
        return [layer.name for layer in self._hooks.rerun_layers()]

    def projected_names(self) -> list[str]:
        """Names of the parameters whose gradients Intra-PROMA projects."""
        if self.intra is None:
            return []
        layers = plan_linear_layers(self.model, self.intra.head)
        projected = {matrix for layer in layers for matrix in layer.matrices}
        if needs_sequences(self.rule, self.intra):
            projected -= {param for layer in self._hooks.rerun_layers() for param in layer.params.values()}
        return [name for name, param in self._trainable() if param in projected]

    def check_sequences(
        self, objective: Callable[[torch.Tensor, Microbatch | None], torch.Tensor], num_sequences: int
    ) -> bool:
        """
        Check on a microbatch that the sequence gradients `s_i` are what they should be: for random `r`,
        `sum_i r_i s_i` is the ordinary gradient of `sum_i r_i objective_i`. It takes two forward and backward passes,
        leaves the model's gradients alone, and does nothing with one sequence a microbatch, where sequence gradients
        are not needed, or where DeepSpeed or FSDP reduce gradients within the backward pass. Call it before the first
        microbatch of an optimizer step.

        Where a module without a rule is not given its sequences one by one, as experts are not whose parent has sorted
        their tokens, the check finds out, and the parent runs again in its place from then on.

        Args:
            objective (`Callable`): Runs the forward pass; `objective(weights, microbatch)` returns
                `sum_i weights_i objective_i` for weights of shape `(k,)`. `microbatch` is `None` in an ordinary pass.
            num_sequences (`int`): k.

        Returns:
            `bool`: Whether there is nothing left to check. `False` where the ordinary gradient is not finite, as when
            half precision overflows, and where the microbatch holds one of several sequences: another microbatch must
            be checked.

        Raises:
            RuntimeError: If a parameter's sequence gradients are wrong, with its name.
        """
        if self.microbatch_size == 1 or not needs_sequences(self.rule, self.intra):
            return True
        if backend_for(self.model, self.accelerator).reduces_in_backward:
            return True
        if num_sequences == 1:
            return False

        def ordinary(weights: torch.Tensor) -> torch.dtype:
            loss = objective(weights, None)
            loss.backward()
            return loss.dtype

        def captured(weights: torch.Tensor) -> torch.dtype:
            with self._capture(REINFORCE()) as microbatch:
                total = objective(torch.ones_like(weights), microbatch)
            self.loss(total, weights, value=total.detach()).backward()
            # Gradients come through frozen layers, too, which may be in half precision
            return microbatch.precision(*{p.dtype for p in self.model.parameters() if p.is_floating_point()})

        while True:
            try:
                return check_sequences(self.model, ordinary, captured, num_sequences)
            except RerunRefused as refused:
                if not self._run_parents_again([refused.module]):
                    raise
            except WrongSequences as error:
                wrong = {self.model.get_parameter(name) for name in error.names}
                layers = [x for x in self._hooks.rerun_layers() if wrong.intersection(x.params.values())]
                if not self._run_parents_again([layer.module for layer in layers]):
                    raise

    def end_step(self) -> None:
        """
        An optimizer step is over. Needed only in a loop without `accelerator` and `optimizer` that leaves gradients as
        they are after a step.
        """
        self._step_began = False
        self._step, self._index = self._step + 1, 0
        if self._accumulator is not None:
            self._accumulator.end()
            self.rule.end_step([*self._names().values()], self._average)

    def pop_metrics(self) -> dict[str, float]:
        """
        What the rule logged since the last call, averaged over microbatches; see the rule's `observe`. Empty if it has
        had nothing to do. The only place that waits for the device.
        """
        means = {name: torch.stack(values).mean().item() for name, values in self._metrics.items()}
        self._metrics.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """
        What a checkpoint must hold, the same on all ranks: the update rule's state, and with Intra-PROMA, whose random
        numbers are a function of it, the number of optimizer steps.
        """
        state = self.rule.state_dict()
        return state if self.intra is None else {_RULE: state, _STEP: self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        if self.intra is not None:
            self._step, state = state[_STEP], state[_RULE]
        self.rule.load_state_dict(state)

    def detach(self) -> None:
        """
        Remove all hooks from model and optimizer: `backward` is ordinary again, until the next `capture`. An optimizer
        step that has begun is given up; the rule's state stays.
        """
        self._hooks.remove()
        if self._step_handle is not None:
            self._step_handle.remove()
        self._captured = self._running = self._backend = self._accumulator = self._step_handle = None
        self._scratch = Scratch()
        self._step_began, self._index, self._left = False, 0, {}

    @contextmanager
    def _capture(self, rule: UpdateRule) -> Iterator[Microbatch]:
        if self._captured is not None and self._captured.phase is Phase.RECORDING:
            raise RuntimeError("`capture()` within `capture()`: a microbatch is captured by itself.")
        if self.accelerator is None and self._step_began:
            self._end_passed_step([*self._left])
        self._hooks.refresh()
        self._follow_optimizer()
        microbatch = Microbatch(self._engine(rule), self._begin_backward, self._end_backward)
        self._captured = microbatch
        try:
            yield microbatch
        finally:
            microbatch.end_recording()

    def _run_parents_again(self, modules: list[nn.Module]) -> bool:
        """Let the parents of modules run again in their places. Returns whether there are any that can."""
        self._with_parents.update(modules)
        self._hooks = self._new_hooks()
        return bool(modules) and not any(self._hooks.follows_module(module) for module in modules)

    def _new_hooks(self) -> ModelHooks:
        all_sequences = needs_sequences(self.rule, self.intra)
        if all_sequences and self.microbatch_size > 1:
            plan = partial(plan_layers, with_parents=self._with_parents)
        elif self.intra is not None:
            plan = partial(plan_linear_layers, head=self.intra.head)
        else:
            plan = _plan_nothing
        return ModelHooks(self.model, self.microbatch_size, plan, all_sequences, self._active)

    def _engine(self, rule: UpdateRule) -> Engine:
        if self._accumulator is None:
            # Only now, as `accelerator.prepare` may wrap and shard what was given to the constructor
            self._backend = backend_for(self.model, self.accelerator)
            self._accumulator = accumulator_for(
                self._backend,
                self.accelerator,
                scope=self.scope,
                size=self.microbatch_size,
                keeps=self.rule.needs_accumulated or (self.intra is not None and self.intra.target == "accumulated"),
                dtype=self.accumulator_dtype,
            )
            if self.memory_budget is None:
                self.memory_budget = self._default_memory_budget()
        return Engine(
            rule=rule,
            backend=self._backend,
            accumulator=self._accumulator,
            names=self._names(),
            microbatch_size=self.microbatch_size,
            memory_budget=self.memory_budget,
            scratch=self._scratch,
            mixed_precision={"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}.get(
                getattr(self.accelerator, "mixed_precision", "no")
            ),
            intra=self.intra if rule is self.rule else None,
            intra_key=(self.seed, self._step, self._index, dist.get_rank() if is_distributed() else 0),
            intra_excluded=self._excluded(),
            intra_measures=self.intra is not None and self._index == self.intra.first_acting,
        )

    def _default_memory_budget(self) -> float:
        # Parameters may be offloaded
        device = self.accelerator.device if self.accelerator else next(p for _, p in self._trainable()).device
        budget = default_memory_budget(device)
        if self.scope == "global" and is_distributed():
            # Ranks exchange sequence gradients by the same ranges, whatever their devices
            smallest = torch.tensor(budget, device=device)
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
            budget = smallest.item()
        return budget

    def _excluded(self) -> frozenset[str]:
        """Names of the linear layers' weights that Intra-PROMA leaves alone."""
        if self.intra is None:
            return frozenset()
        weights = self._hooks.left_by_intra() + ([] if self.intra.head else head_weights(self.model))
        if not weights:
            return frozenset()
        owners = {self._backend.owner(weight) for weight in weights}
        return frozenset(name for param, name in self._names().items() if param in owners)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    def _names(self) -> dict[nn.Parameter, str]:
        names: dict[nn.Parameter, str] = {}
        for name, param in self._trainable():
            # FSDP shows shards or whole copies, and of a tied parameter one copy for each module
            names.setdefault(self._backend.owner(param), name)
        return names

    def _active(self, model_runs: bool) -> Microbatch | None:
        captured, running = self._captured, self._running
        if captured is not None and captured.phase is Phase.RECORDING:
            return captured
        if running is None:
            return None
        if backward_runs():
            return running
        if model_runs:  # outside of a backward pass: an exception broke it off
            running.abandon()
            self._running = None
        return None

    def _begin_backward(self, microbatch: Microbatch) -> None:
        if self._running is not None and self._running.backward_id == backward_id():
            raise RuntimeError(
                "One backward pass holds the losses of two microbatches. Call `backward` on each loss by itself: the "
                "second is projected against what the first has accumulated."
            )
        if self._running is not None:
            self._running.abandon()
        if self.accelerator is None:
            self._end_passed_step([*microbatch.engine.names])
        self._running = microbatch

    def _end_backward(self, microbatch: Microbatch) -> None:
        self._running = None
        if microbatch.engine.rule is not self.rule:  # a check
            self._accumulator.end()
            return
        self._step_began = True
        if self.accelerator is None:
            self._left = {param: (contents(param), contents(param.grad)) for param in microbatch.engine.names}
        self._index += 1
        for name, value in microbatch.metrics().items():
            self._metrics[name].append(value)
        if self.accelerator is not None and self.accelerator.sync_gradients:
            self.end_step()

    def _end_passed_step(self, params: list[nn.Parameter]) -> None:
        """
        A microbatch begins in a loop without an accelerator. If the last one ended a step, its gradients are gone.

        Raises:
            RuntimeError: If the step seems to be over, and nothing says so.
        """
        unknown = (None, None)
        written = any(contents(param.grad) != self._left.get(param, unknown)[1] for param in params)
        if written and all_zero([param.grad for param in params if param.grad is not None]):
            # As `zero_grad(set_to_none=False)` leaves them. There is nothing that a microbatch could be projected off
            for param in params:
                param.grad = None
        if not self._step_began:
            return
        held = [param for param in params if self._backend.accumulated(param) is not None]
        if not held:
            self.end_step()
        elif self.optimizer is None and all(contents(p) != self._left.get(p, unknown)[0] for p in held):
            raise RuntimeError(
                "The parameters have changed since the last microbatch, as in an optimizer step, and their gradients "
                "are still there, so that it is unknown whether the step is over. Give `ProjectedAccumulation` the "
                "`optimizer` (or the `accelerator`), clear gradients after each step (`optimizer.zero_grad()`), or "
                "call `accumulation.end_step()` after it."
            )

    def _follow_optimizer(self) -> None:
        """Let the optimizer's steps end those of the accumulation."""
        if self.optimizer is None or self._step_handle is not None:
            return
        accumulation = weakref.ref(self)

        def stepped(*_: Any) -> None:
            own = accumulation()
            if own is not None and own._step_began:
                own.end_step()

        # Accelerate's is around another, which it leaves out where gradients overflow
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self._step_handle = optimizer.register_step_post_hook(stepped)

    def _weights_left(
        self, microbatch: Microbatch, objective: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor | None:
        """
        What the backward pass has to multiply the sequences by; `None` if nothing.

        Raises:
            ValueError: If a sum has other weights than it needs.
        """
        wanted, k = microbatch.weights, microbatch.num_sequences
        if objective.dim() == 1:
            if weights is not None:
                raise ValueError("`weights` is for an `objective` that is a sum, got one number for each sequence.")
            return wanted
        if weights is None:
            if wanted is not None and k > 1:
                raise ValueError(
                    "With Intra-PROMA alone, a sum of objectives must be weighted by sequence. Pass `objective` as "
                    f"one number for each of the {k} sequences; or multiply each by its entry of `weights = "
                    "accumulation.sequence_weights(advantages)` before summing, and pass `weights` here."
                )
            return None if wanted is None else wanted[0]
        if weights.shape != (k,) or not torch.equal(
            weights.detach(), torch.ones_like(weights) if wanted is None else wanted
        ):
            raise ValueError(
                "`weights` must be what `accumulation.sequence_weights(advantages)` returns for these advantages, got "
                f"{weights.tolist()}."
            )
        return None

    def _average(self, value: torch.Tensor) -> torch.Tensor:
        if is_distributed():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        return value


def _plan_nothing(model: nn.Module) -> list[Layer]:
    return []
