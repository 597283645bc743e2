"""From the sequence gradients of one tensor to what is emitted as its gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..backends import Backend, whole_shape
from ..intra import IntraPROMA
from ..intra.intra_proma import IntraProjection, Subspaces, sequence_weights
from ..rules import InnerProducts, UpdateRule
from ..sequence_grads.experts import ExpertFactors
from ..sequence_grads.forms import SequenceGrads
from ..sequence_grads.tensor import Scratch, TensorGrads
from .accumulators import Accumulator, Request

GIB = 2**30


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
        intra ([`IntraPROMA`] or `None`): Settings of Intra-PROMA, where it removes anything.
        intra_key (`tuple[int, ...]`): Seed, optimizer step, microbatch and rank.
        intra_excluded (`frozenset[str]`): Names of parameters that Intra-PROMA leaves alone.
        intra_measures (`bool`): Whether it measures what it does.
    """

    rule: UpdateRule
    backend: Backend
    accumulator: Accumulator
    names: dict[nn.Parameter, str]
    microbatch_size: int
    memory_budget: float
    scratch: Scratch
    mixed_precision: torch.dtype | None
    intra: IntraPROMA | None = None
    intra_key: tuple[int, ...] = ()
    intra_excluded: frozenset[str] = frozenset()
    intra_measures: bool = False

    @property
    def needs_sequences(self) -> bool:
        """Whether the gradients of single sequences are needed. If not, the backward pass is that of their sum."""
        return needs_sequences(self.rule, self.intra)

    def sequence_weights(self, advantages: torch.Tensor) -> torch.Tensor | None:
        """See [`Microbatch`]'s `weights`."""
        return None if self.needs_sequences else sequence_weights(advantages, self.mixed_precision)


class Emission:
    """
    What a microbatch emits, tensor by tensor: `sum_i c_i s_i`, with coefficients by the update rule, and off
    Intra-PROMA's subspaces.

    Args:
        engine ([`Engine`]): What the microbatches share.
        num_sequences (`int`): k.
        policy (`(k,)` or `None`): Coefficients of the policy gradient; `None` where all are one.
        autocast (`torch.dtype` or `None`): What the forward pass was autocast to.
        loss_scale (scalar): What the backward pass multiplies the loss by.
        intra ([`IntraProjection`] or `None`): Intra-PROMA on this microbatch.
    """

    def __init__(
        self,
        engine: Engine,
        num_sequences: int,
        *,
        policy: torch.Tensor | None,
        autocast: torch.dtype | None,
        loss_scale: torch.Tensor,
        intra: IntraProjection | None,
    ):
        self.engine = engine
        self._num_sequences = num_sequences
        self._policy = policy
        self._autocast = autocast
        self._loss_scale = loss_scale
        self._intra = intra
        self._experts: defaultdict[nn.Parameter, list[Subspaces]] = defaultdict(list)
        self._products: list[InnerProducts] = []

    def emit(self, leaf: nn.Parameter, param: nn.Parameter, parts: Sequence[SequenceGrads]) -> torch.Tensor:
        """
        Args:
            leaf (`nn.Parameter`): What autograd hands the emission to; it has its dtype.
            param (`nn.Parameter`): The parameter that it stands for.
            parts (`Sequence[SequenceGrads]`): The gradients of all uses.
        """
        grads = self._tensor_grads(leaf, param, parts)
        ranges = grads.ranges
        with torch.no_grad(), torch.autocast(leaf.device.type, enabled=False):
            subspaces = self._subspaces(param, grads)
            if not subspaces:
                emission = self._combined(leaf, param, grads)
            elif self.engine.intra.target == "accumulated":
                emission = self._combined_off_accumulated(leaf, param, grads, subspaces)
            else:
                emission = self._combined_off_microbatch(leaf, param, grads, subspaces)
            emission = emission.to(leaf.dtype).view(whole_shape(param))
            self.engine.accumulator.keep(param, emission, ranges)
        return emission

    def needs_products(self, param: nn.Parameter) -> bool:
        """Whether the rule needs the inner products of a parameter's sequence gradients."""
        rule = self.engine.rule
        return rule.needs_gram or (rule.needs_accumulated and self.engine.accumulator.holds(param))

    def projects(self, param: nn.Parameter) -> bool:
        """Whether Intra-PROMA has a gradient of a parameter to project, if this is a linear layer's weight."""
        if self._intra is None or self.engine.names[param] in self.engine.intra_excluded:
            return False
        target = self._intra.settings.target
        return target == "microbatch" or self.engine.accumulator.accumulated(param) is not None

    def receive_experts(self, param: nn.Parameter, experts: ExpertFactors) -> None:
        """Take what shapes the subspaces of some experts of a mixture, before the gradient of `param` is there."""
        if self.projects(param):
            self._experts[param].append(self._intra.experts_subspaces(self.engine.names[param], experts))

    def knows_experts(self, param: nn.Parameter) -> bool:
        """Whether that has been received for a parameter."""
        return param in self._experts

    def head_rows(
        self, param: nn.Parameter, length: int, rows: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """See [`Microbatch`]."""
        if not self.projects(param) or not self._intra.settings.power_iterations:
            return None
        return self._intra.first_rows(self.engine.names[param], 0, length, rows, dtype)

    def metrics(self) -> dict[str, torch.Tensor]:
        """What rule and Intra-PROMA log about the backward pass: scalars by name."""
        metrics = {}
        for group in ([p for p in self._products if (p.overlaps is None) == first] for first in (True, False)):
            if group:
                products = InnerProducts.stack(group)
                advantages = self.engine.accumulator.advantages.to(products.gram)
                metrics |= self.engine.rule.observe(products, advantages)
        return metrics if self._intra is None else metrics | self._intra.metrics()

    def _combined(
        self, leaf: nn.Parameter, param: nn.Parameter, grads: TensorGrads, acc: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`sum_i c_i s_i`, by the rule, against `acc` if it is not what has been accumulated."""
        if not self.needs_products(param):
            return grads.combine(self._policy)
        products, advantages = self._products_of(leaf, param, grads, acc)
        if self._intra is not None:  # as for the tensors that it projects
            policy_sq = products.length_sq(self.engine.rule.policy(products, advantages))
            products = replace(products, policy_sq=policy_sq)
        self._products.append(products)
        coefficients = self.engine.rule.coefficients(products, advantages)
        return grads.combine(coefficients[self.engine.accumulator.own])

    def _combined_off_microbatch(
        self, leaf: nn.Parameter, param: nn.Parameter, grads: TensorGrads, subspaces: Sequence[Subspaces]
    ) -> torch.Tensor:
        """The policy gradient, off the subspaces, and what the rule removes, relative to what is left of it."""
        rule, own = self.engine.rule, self.engine.accumulator.own
        if not self.needs_products(param):
            emission = grads.combine(self._policy)
            self._intra.remove(subspaces, emission)
            return emission
        products, advantages = self._products_of(leaf, param, grads)
        policy = rule.policy(products, advantages)
        emission = grads.combine(policy[own])
        self._intra.remove(subspaces, emission)
        policy_sq = torch.linalg.vector_norm(emission, dtype=emission.dtype).square()
        products = replace(products, policy_sq=policy_sq.to(products.gram))
        self._products.append(products)
        coefficients = rule.coefficients(products, advantages)
        return grads.add_combined(emission, (coefficients - policy)[own])

    def _combined_off_accumulated(
        self, leaf: nn.Parameter, param: nn.Parameter, grads: TensorGrads, subspaces: Sequence[Subspaces]
    ) -> torch.Tensor:
        """What has been accumulated is projected off the subspaces first."""
        acc = self.engine.accumulator.accumulated(param).view(grads.shape)
        rest = acc.to(grads.dtype, copy=True)
        self._intra.remove(subspaces, rest)
        return self._combined(leaf, param, grads, rest) + (rest - acc)

    def _subspaces(self, param: nn.Parameter, grads: TensorGrads) -> Sequence[Subspaces]:
        if not self.projects(param):
            return []
        return self._experts.pop(param, None) or self._intra.subspaces(self.engine.names[param], grads.parts)

    def _products_of(
        self, leaf: nn.Parameter, param: nn.Parameter, grads: TensorGrads, acc: torch.Tensor | None = None
    ) -> tuple[InnerProducts, torch.Tensor]:
        """The inner products of a tensor, and the advantages in their dtype."""
        products = self.engine.accumulator.inner_products(self._request(leaf, param, acc), grads)
        return products, self.engine.accumulator.advantages.to(products.gram)

    def _tensor_grads(self, leaf: nn.Parameter, param: nn.Parameter, parts: Sequence[SequenceGrads]) -> TensorGrads:
        size = self.engine.accumulator.planned_sequences or self._num_sequences
        limit = int(self.engine.memory_budget * GIB) // (size + 1)
        shape = tuple(whole_shape(param)) or (1,)
        return TensorGrads(parts, shape, leaf, self._num_sequences, limit, self.engine.scratch)

    def _request(self, leaf: nn.Parameter, param: nn.Parameter, acc: torch.Tensor | None) -> Request:
        return Request(
            name=self.engine.names[param],
            param=param,
            acc=acc,
            overlaps=self.engine.rule.needs_accumulated,
            inverts_gram=self.engine.rule.inverts_gram,
            precision=lowest_precision(leaf.dtype, self._autocast),
            loss_scale=self._loss_scale,
        )


def needs_sequences(rule: UpdateRule, intra: IntraPROMA | None) -> bool:
    """Whether a rule, beside Intra-PROMA or without it, needs the gradients of single sequences."""
    return intra is None or not rule.is_plain


def lowest_precision(*dtypes: torch.dtype | None) -> torch.dtype:
    """The lowest of some precisions: of parameters, and of what autocast casts to, if it does."""
    return max((dtype for dtype in dtypes if dtype is not None), key=lambda dtype: torch.finfo(dtype).eps)
