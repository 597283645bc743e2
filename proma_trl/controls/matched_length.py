"""REINFORCE with the step length of another method."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..trainer import PROMATrainer
from ..trainer.trl_internals import replaced

LENGTH_RATIO = "control/length_ratio"


class MatchedLengthTrainer(PROMATrainer):
    r"""
    REINFORCE, each of whose parameter updates is as long as the one that the method of its settings would have made
    there, after the optimizer. If this does as well as the method, the method is one for choosing step lengths.

    Each microbatch is sent backward twice, once by the method and once by REINFORCE, and each has an optimizer of its
    own, with its own moments, whose gradients are clipped by `max_grad_norm`. The update of REINFORCE's is then
    multiplied by the ratio of the two updates' lengths (of all parameters together), which is logged as
    `control/length_ratio`.

    It takes a second copy of weights, gradients and optimizer states, and one device. It does not resume.

    Raises:
        ValueError: For settings that are REINFORCE, for more than one process, and for a checkpoint to resume from.

    Example:

    ```python
    from proma_trl import PROMAConfig
    from proma_trl.controls import MatchedLengthTrainer

    trainer = MatchedLengthTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, args=PROMAConfig(), train_dataset=data)
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "control", "proma-trl"]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        method, self._tag_names = self._name, type(self)._tag_names
        self._card_evidence = ()
        self._name = f"REINFORCE with the step length of {method}"
        if self.accumulation is None:
            raise ValueError(
                "`MatchedLengthTrainer` gives REINFORCE another method's step length, and with these settings that is "
                f"{method}. Set `projection`, `isopo` or `intra_dim`."
            )
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"`MatchedLengthTrainer` works with one process, and there are {self.accelerator.num_processes}."
            )
        self.method_gradients: dict[str, torch.Tensor | None] = {}
        self.add_callback(_MatchLength(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with replaced(self, "_prepare_inputs", lambda batch: batch):
            with self._by_the_method():
                Trainer.training_step(self, model, inputs, num_items_in_batch)
            with replaced(self, "accumulation", None):
                return super().training_step(model, inputs, num_items_in_batch)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by name."""
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    @contextmanager
    def _by_the_method(self) -> Iterator[None]:
        """Within the context, gradients are the method's, nothing is logged, and no callback sees what is trained."""
        own = {name: param.grad for name, param in self.trained()}
        for name, param in self.trained():
            param.grad = self.method_gradients.get(name)
        with self._unlogged(), replaced(self, "compute_loss", partial(type(self).compute_loss, self)):
            yield
        for name, param in self.trained():
            self.method_gradients[name], param.grad = param.grad, own[name]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            raise ValueError(
                "`MatchedLengthTrainer` keeps the method's optimizer, which no checkpoint holds, so it can't resume. "
                "Leave `resume_from_checkpoint` out."
            )
        super()._load_optimizer_and_scheduler(checkpoint)


class _MatchLength(TrainerCallback):
    """Gives the optimizer's update the length of the method's."""

    def __init__(self, trainer: MatchedLengthTrainer):
        self.trainer = trainer
        self._before: dict[str, torch.Tensor] = {}
        self._copies: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._optimizer = None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is around it
        if self._optimizer is None:
            self._copies = {name: nn.Parameter(param.detach().clone()) for name, param in self.trainer.trained()}
            self._optimizer = self._same_optimizer(optimizer)
        gradients = self.trainer.method_gradients
        for name, param in self.trainer.trained():
            self._before[name] = param.detach().clone()
            self._copies[name].data.copy_(param)
            self._copies[name].grad = gradients.get(name)
        gradients.clear()
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._copies.values(), args.max_grad_norm)
        for own, group in zip(self._optimizer.param_groups, optimizer.param_groups, strict=True):
            own["lr"] = group["lr"]
        self._optimizer.step()

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        trained = dict(self.trainer.trained())
        method = _distance(self._before, self._copies)
        length = _distance(self._before, trained)
        # Where REINFORCE makes no step, there is none to rescale
        ratio = torch.where(length > 0, method / length, 1)
        for name, param in trained.items():
            param.copy_(torch.lerp(self._before[name], param, ratio.to(param)))
        self._before.clear()
        self.trainer._metrics["train"][LENGTH_RATIO].append(ratio.item())

    def _same_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        names = {param: name for name, param in self.trainer.trained()}
        groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            | {"params": [self._copies[names[param]] for param in group["params"]]}
            for group in optimizer.param_groups
        ]
        return type(optimizer)(groups)


def _distance(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([(after[name].float() - old.float()).norm() for name, old in before.items()]).norm()
