"""Intra-PROMA (arXiv 2601.10498 v4), the paper's second variant.

For the weight of a linear layer that a microbatch of N real tokens uses, with inputs X (N, d_in) and gradients G
(N, d_out) at its outputs, those of the objective at advantages of one:

    Q_a, Q_g   orthonormal bases of dominant subspaces, of dimension d, of the rows of X and of G
    pg        <-  pg - strength * Q_g (Q_g^T pg Q_a) Q_a^T

where pg is the microbatch's policy gradient. With `target="accumulated"`, what has been accumulated so far is
projected in the place of pg. None of this needs other microbatches, other ranks, or the gradients of single sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..rules.proma import PAPER
from ..sequence_grads.experts import ExpertFactors
from ..sequence_grads.forms import BatchedFactor, Factor, LinearGrads, SequenceGrads, StackedFactor, TokenFactor
from ..torch_internals import StorageCache
from ..validation import check_choice, check_real, check_whole
from .noise import SketchNoise, Tokens
from .subspaces import captured_share, dominant_subspace

TARGETS = ("microbatch", "accumulated")

# Weight of a sequence whose advantage is zero, relative to the largest advantage: its part of other gradients is far
# below their rounding, and its output gradients are still normal numbers.
_SMALL = 2.0**-40
_SMALL_FLOAT16 = 2.0**-12


@dataclass(frozen=True)
class IntraPROMA:
    """
    Settings of Intra-PROMA.

    Args:
        dim (`int`, defaults to `10`):
            d, the dimension of the subspaces; `0` for no projection.
        power_iterations (`int`, defaults to `1`):
            Number of power iterations that find them.
        strength (`float`, defaults to `1.0`):
            Part of the gradient within the subspaces that is removed, between 0 and 1.
        target (`str`, defaults to `"microbatch"`):
            What is projected: `"microbatch"`, the microbatch's policy gradient, or `"accumulated"`, what has been
            accumulated before it.
        head (`bool`, defaults to `True`):
            Whether the weight of the LM head is projected.

    Raises:
        ValueError: If a value is outside its range.
    """

    dim: int = 10
    power_iterations: int = 1
    strength: float = 1.0
    target: str = "microbatch"
    head: bool = True

    name: ClassVar[str] = "Intra-PROMA"
    tags: ClassVar[tuple[str, ...]] = ("proma", "intra-proma")
    papers: ClassVar[tuple[dict[str, str], ...]] = (PAPER,)

    def __post_init__(self) -> None:
        check_intra(self.dim, self.power_iterations, self.strength, self.target, self.head)

    @property
    def removes(self) -> bool:
        """Whether anything can be removed at all."""
        return self.dim > 0 and self.strength > 0

    @property
    def first_acting(self) -> int:
        """The first microbatch of an optimizer step in which anything is removed."""
        return 1 if self.target == "accumulated" else 0


def check_intra(dim: Any, power_iterations: Any, strength: Any, target: Any, head: Any, prefix: str = "") -> None:
    """
    Check settings of [`IntraPROMA`].

    Args:
        dim, power_iterations, strength, target, head: The settings.
        prefix (`str`, *optional*): What their names begin with where the user has set them.

    Raises:
        ValueError: If a value is outside its range.
    """
    check_whole(f"{prefix}dim", dim, "With 0, nothing is projected.", low=0)
    check_whole(f"{prefix}power_iterations", power_iterations, low=0)
    check_real(f"{prefix}strength", strength, "a number between 0 and 1", high=1.0)
    check_choice(f"{prefix}target", target, TARGETS)
    if not isinstance(head, bool):
        raise ValueError(f"`{prefix}head` must be True or False, got {head!r}.")


@dataclass(frozen=True)
class Subspaces:
    """
    The subspaces of a parameter tensor, or of each of a batch `...` of matrices that it holds from place `first` on,
    with orthonormal bases, of which some columns may be zero.

    Attributes:
        left (`(..., rows, d)`): In the space of its columns: `Q_g`, where its rows are the layer's outputs.
        right (`(..., columns, d)`): In the space of its rows: `Q_a`.
        strength (`float`): Part of a gradient within the subspaces that is removed.
        first (`int`): Place of the first matrix.
    """

    left: torch.Tensor
    right: torch.Tensor
    strength: float
    first: int = 0

    def remove_from(self, gradient: torch.Tensor) -> torch.Tensor:
        """Project a gradient of the tensor in place. Returns what was removed, in the bases: `(..., d, d)`."""
        if self.left.dim() == 3:
            gradient = gradient[self.first : self.first + len(self.left)]
        core = self.strength * ((self.left.mT @ gradient.to(self.left.dtype)) @ self.right)
        left, right = self.left.to(gradient.dtype), (core @ self.right.mT).to(gradient.dtype)
        subtract = torch.Tensor.addmm_ if gradient.dim() == 2 else torch.Tensor.baddbmm_
        subtract(gradient, left, right, alpha=-1)
        return core


class IntraProjection:
    """
    Intra-PROMA on the tensors of one microbatch.

    Args:
        settings ([`IntraPROMA`]): The settings.
        key (`Sequence[int]`): What tells the microbatch from others: seed, optimizer step, microbatch, rank.
        num_sequences (`int`): k.
        real (`(k, T)`, *optional*): Which tokens are real, by the attention mask. Defaults to all.
        device (`torch.device`): Where the model's inputs are.
        weights (`(k,)`, *optional*): Weights of the sequences in the backward pass. Defaults to one.
        measures (`bool`): Whether metrics are measured, which takes one more product with each factor.
    """

    def __init__(
        self,
        settings: IntraPROMA,
        key: Sequence[int],
        num_sequences: int,
        real: torch.Tensor | None,
        device: torch.device,
        weights: torch.Tensor | None,
        measures: bool,
    ):
        self.settings = settings
        self._noise = SketchNoise(key, settings.dim, num_sequences, device)
        self._num_sequences, self._real, self._device = num_sequences, real, device
        # Gradients at outputs come multiplied by the sequences' weights
        unweigh = torch.ones(num_sequences, device=device) if weights is None else _reciprocal(weights)
        self._unweigh = unweigh.view(-1, 1, 1)
        self._measures = measures
        self._tokens: dict[tuple[int, int], Tokens] = {}
        self._starts: dict[str, torch.Tensor] = {}
        self._inputs: StorageCache[torch.Tensor] = StorageCache()
        self._captured: dict[str, list[torch.Tensor]] = {"intra/captured_inputs": [], "intra/captured_grads": []}
        self._removed_sq: list[torch.Tensor] = []
        self._gradients_sq: list[torch.Tensor] = []

    def subspaces(self, name: str, parts: Sequence[SequenceGrads]) -> list[Subspaces]:
        """
        The subspaces of a tensor's inputs and output gradients.

        Args:
            name (`str`): The tensor's name.
            parts (`Sequence[SequenceGrads]`): The sequence gradients of its uses. Those in linear layers count, as one
                layer with the tokens of all.

        Returns:
            `list` of [`Subspaces`]: Empty for a tensor that is no linear layer's weight.
        """
        linear = [part for part in parts if isinstance(part, LinearGrads)]
        if not linear:
            return []
        left, right = zip(*(part.factors() for part in linear), strict=True)
        if linear[0].inputs == "left":
            return [Subspaces(self._of_inputs(name, left), self._of_gradients(name, right), self.settings.strength)]
        return [Subspaces(self._of_gradients(name, left), self._of_inputs(name, right), self.settings.strength)]

    def experts_subspaces(self, name: str, experts: ExpertFactors) -> Subspaces:
        """The subspaces of some experts' inputs and output gradients, each expert a layer with its own tokens."""
        dtype = experts.inputs.dtype
        flat = experts.rows.flatten()
        tokens = self._of_tokens(0, experts.num_tokens)
        noise = self._noise(name, tokens, dtype).flatten(0, 1)[flat].view(*experts.rows.shape, -1)
        used = experts.used.unsqueeze(-1).to(dtype)
        real = tokens.real.flatten()[flat].view_as(used).to(dtype) * used
        unweigh = self._unweigh.expand(-1, experts.num_tokens, -1).flatten()[flat].view_as(used).to(dtype) * used
        inputs = self._basis("intra/captured_inputs", BatchedFactor(experts.inputs), noise * real, real)
        grads = self._basis("intra/captured_grads", BatchedFactor(experts.grads), noise * unweigh, unweigh)
        left, right = (inputs, grads) if experts.transposed else (grads, inputs)
        return Subspaces(left, right, self.settings.strength, experts.first)

    def first_rows(
        self, name: str, first: int, length: int, rows: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """
        What the gradients at a layer's outputs, the tokens `first:first + length` of each sequence, or those `rows` of
        them, are multiplied by first: noise, over the sequences' weights, `(R, d)`.
        """
        if name not in self._starts:
            noise = self._noise(name, self._of_tokens(first, length), dtype)
            self._starts[name] = _picked((noise * self._unweigh.to(dtype)).flatten(0, 1), rows)
        return self._starts[name]

    def remove(self, subspaces: Sequence[Subspaces], gradient: torch.Tensor) -> None:
        """Project `gradient` in place, and note it for the metrics."""
        if self._measures:
            self._gradients_sq.append(torch.linalg.vector_norm(gradient, dtype=subspaces[0].left.dtype).square())
        cores = [part.remove_from(gradient) for part in subspaces]
        if self._measures:
            self._removed_sq += [core.square().sum() for core in cores]

    def metrics(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `intra/norm_ratio`: norm of what was removed over the norm of the gradient that
            it was removed from, all projected tensors together; `intra/captured_inputs` and `intra/captured_grads`:
            share of the squared norm of X and of G in the subspaces, averaged over layers.
        """
        found = {name: torch.stack(shares).mean() for name, shares in self._captured.items() if shares}
        if self._removed_sq:
            removed, total = torch.stack(self._removed_sq).sum(), torch.stack(self._gradients_sq).sum()
            found["intra/norm_ratio"] = (removed / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt()
        return found

    def _of_inputs(self, name: str, factors: Sequence[TokenFactor]) -> torch.Tensor:
        source = factors[0].source if len(factors) == 1 else None
        basis = None if source is None else self._inputs.get(source)
        if basis is None:
            tokens = [self._of_tokens(factor.first_token, factor.num_tokens) for factor in factors]
            real = torch.cat([t.real.flatten(0, 1) for t in tokens]).to(factors[0].dtype)
            noise = [self._noise(_use(name, i), t, real.dtype).flatten(0, 1) for i, t in enumerate(tokens)]
            rows = noise[0] if len(noise) == 1 else torch.cat(noise)
            basis = self._basis("intra/captured_inputs", self._stacked(factors), rows, real)
            if source is not None:
                self._inputs.put(source, basis)
        return basis

    def _of_gradients(self, name: str, factors: Sequence[TokenFactor]) -> torch.Tensor:
        dtype = factors[0].dtype
        rows = [
            self.first_rows(_use(name, i), f.first_token, f.num_tokens, f.rows, dtype) for i, f in enumerate(factors)
        ]
        for i in range(len(factors)):  # a tensor's come to their end here
            del self._starts[_use(name, i)]
        # The very tensor, if there is one only: a sweep of it may have been made
        rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        weights = [_picked(self._unweigh.expand(-1, f.num_tokens, -1).flatten(0, 1), f.rows) for f in factors]
        return self._basis("intra/captured_grads", self._stacked(factors), rows, torch.cat(weights).to(dtype))

    def _stacked(self, factors: Sequence[TokenFactor]) -> Factor:
        lengths = [self._num_sequences * f.num_tokens if f.rows is None else len(f.rows) for f in factors]
        return factors[0] if len(factors) == 1 else StackedFactor(factors, lengths)

    def _basis(self, metric: str, factor: Factor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        basis = dominant_subspace(factor, rows, weights, self.settings.power_iterations)
        if self._measures:
            self._captured[metric].append(captured_share(factor, basis, weights).mean())
        return basis

    def _of_tokens(self, first: int, length: int) -> Tokens:
        key = (first, length)
        if key not in self._tokens:
            self._tokens[key] = self._find_tokens(*key)
        return self._tokens[key]

    def _find_tokens(self, first: int, length: int) -> Tokens:
        stop, real = first + length, self._real
        # Some layers see several rows a token, one after another: each head's
        if real is not None and first == 0 and length % real.shape[1] == 0:
            real = real.repeat_interleave(length // real.shape[1], 1)
        if real is None or real.shape[1] < stop:
            places = torch.arange(first, stop, device=self._device).expand(self._num_sequences, -1)
            return Tokens(places, torch.ones((self._num_sequences, length, 1), device=self._device), stop)
        places = real.cumsum(1).sub_(1).clamp_(min=0)
        return Tokens(places[:, first:stop], real[:, first:stop].unsqueeze(-1), stop)


def sequence_weights(advantages: torch.Tensor, precision: torch.dtype | None) -> torch.Tensor:
    """
    Weights of the sequences, `(k,)`, in a backward pass that gives all parameters the policy gradient at once: their
    advantages. A sequence with an advantage of zero takes part with a weight so small that it changes no gradient, as
    its output gradients count for the subspaces like any other's.

    Args:
        advantages (`(k,)`): The advantages.
        precision (`torch.dtype` or `None`): What the passes are autocast to.
    """
    small = (_SMALL_FLOAT16 if precision == torch.float16 else _SMALL) * advantages.abs().amax()
    return torch.where(advantages == 0, small, advantages)


def _picked(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values if rows is None else values.index_select(0, rows)


def _reciprocal(weights: torch.Tensor) -> torch.Tensor:
    return torch.where(weights == 0, 0, 1 / torch.where(weights == 0, 1, weights))


def _use(name: str, index: int) -> str:
    return name if index == 0 else f"{name}#{index}"
