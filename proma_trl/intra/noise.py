"""The random matrices of a microbatch's sketches."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..devices import to_device
from .subspaces import fill_up


@dataclass(frozen=True)
class Tokens:
    """
    The tokens that a factor's rows belong to.

    Attributes:
        places (`(k, N)`): Their places among the real tokens of their sequences.
        real (`(k, N, 1)`): Which of them are real.
        limit (`int`): A bound that all places are below.
    """

    places: torch.Tensor
    real: torch.Tensor
    limit: int


class SketchNoise:
    """
    Normal numbers for the tokens of a microbatch: functions of a key, of a tensor's name, and of a token's place among
    the real tokens of its sequence, so that padding changes nothing. They are drawn on the CPU by a generator of their
    own, and are the same on all devices. Their variance, on which no span depends, is between 1 and 2.

    Args:
        key (`Sequence[int]`): What tells one microbatch from another: seed, optimizer step, microbatch, rank.
        dim (`int`): How many numbers a token has. They are filled up to d with zeros.
        num_sequences (`int`): k.
        device (`torch.device`): Where they are needed.
    """

    def __init__(self, key: Sequence[int], dim: int, num_sequences: int, device: torch.device):
        digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
        self._seed = int.from_bytes(digest[:4], "little")  # the CPU's generator uses 32 bits
        self._dim = dim
        self._num_sequences = num_sequences
        self._device = device
        # For each set of tokens, which is kept so that its identity is its own
        self._pairs: dict[int, tuple[Tokens, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, name: str, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of some tokens for the tensor `name`, `(k, N, d)`: zero for those that are not real."""
        if id(tokens) not in self._pairs:
            self._pairs[id(tokens)] = (tokens, *self._draw(tokens))
        _, left, right = self._pairs[id(tokens)]
        # Each angle makes other numbers of the same distribution, so that one drawing serves all tensors. Only what
        # they span matters, so the larger of the angle's sine and cosine is divided out
        angle = 2 * math.pi * zlib.crc32(name.encode()) / 2**32
        sine, cosine = math.sin(angle), math.cos(angle)
        if abs(sine) > abs(cosine):
            left, right, sine, cosine = right, left, cosine, sine
        return torch.add(left, right, alpha=sine / cosine).to(dtype)

    def _draw(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        # The first numbers are the same, however many follow, as long as their count is a multiple of 16
        shape = (math.ceil(tokens.limit / 16) * 16, 2, self._num_sequences, self._dim)
        drawn = fill_up(torch.randn(shape, generator=generator))
        left, right = to_device(drawn, self._device).unbind(1)
        places = tokens.places.T.unsqueeze(-1).expand(-1, -1, left.shape[-1])
        return tuple(x.gather(0, places).transpose(0, 1).contiguous() * tokens.real for x in (left, right))
