"""
Which sequences of an optimizer step share a microbatch, and the order in which microbatches come.

TRL chooses what a step trains on, and divides it at random. Here, sequences of similar length share a microbatch,
since the longest prompt and the longest completion decide how many positions each of them takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .trl_internals import join_images, split_images


def positions(lengths: Sequence[tuple[int, int]]) -> int:
    """
    The token positions of a microbatch.

    Args:
        lengths (`Sequence[tuple[int, int]]`): Numbers of real tokens of each sequence's prompt and completion.
    """
    prompts, completions = zip(*lengths, strict=True)
    return len(lengths) * (max(prompts) + max(completions))


def divide(lengths: Sequence[tuple[int, int]], num_microbatches: int, equal: bool = False) -> list[list[int]]:
    """
    Divide sequences into microbatches of sequences of like length.

    Args:
        lengths (`Sequence[tuple[int, int]]`): Numbers of real tokens of each sequence's prompt and completion.
        num_microbatches (`int`): At most the number of sequences.
        equal (`bool`, defaults to `False`): Whether microbatches hold equally many sequences, which their number then
            divides. If not, the largest number of positions in one is as small as possible for this order.

    Returns:
        `list[list[int]]`: Places of the sequences of each microbatch, those with the longest completions first.
    """
    # Prompts and completions are padded separately, and completions differ more
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i][1], -lengths[i][0], i))
    if equal:
        size = len(ordered) // num_microbatches
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]
    # The least limit on positions with which no more microbatches are needed
    low, high = max(map(sum, lengths)), positions(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(ordered, lengths, middle)) <= num_microbatches:
            high = middle
        else:
            low = middle + 1
    microbatches = _fill(ordered, lengths, low)
    while len(microbatches) < num_microbatches:
        index = max(
            (i for i, rows in enumerate(microbatches) if len(rows) > 1),
            key=lambda i: positions([lengths[row] for row in microbatches[i]]),
        )
        rows = microbatches[index]
        microbatches[index : index + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return microbatches


def _fill(ordered: Sequence[int], lengths: Sequence[tuple[int, int]], limit: int) -> list[list[int]]:
    """Fill microbatches with sequences in order, each up to a limit on positions; a longer sequence stays alone."""
    microbatches: list[list[int]] = []
    longest_prompt = longest_completion = 0
    for row in ordered:
        prompt, completion = lengths[row]
        longest_prompt, longest_completion = max(longest_prompt, prompt), max(longest_completion, completion)
        if microbatches and (len(microbatches[-1]) + 1) * (longest_prompt + longest_completion) <= limit:
            microbatches[-1].append(row)
        else:
            microbatches.append([row])
            longest_prompt, longest_completion = prompt, completion
    return microbatches


@dataclass(frozen=True)
class Microbatch:
    """
    A microbatch of an optimizer step.

    Attributes:
        inputs (`dict`): What TRL's loss takes.
        num_counted (`int`): Number of tokens that the loss counts.
    """

    inputs: dict[str, Any]
    num_counted: int


@dataclass(frozen=True)
class Positions:
    """
    Token positions of an optimizer step on this rank.

    Attributes:
        padded (`int`): With the padding of the whole generation batch, as TRL runs them.
        trimmed (`int`): In TRL's microbatches, without columns of padding.
        laid_out (`int`): In the microbatches that are trained on.
        largest (`int`): In the largest of these.
        tokens (`int`): Real tokens in these.
        skipped (`int`), sequences (`int`): Sequences that are left out, and all of the step.
    """

    padded: int
    trimmed: int
    laid_out: int
    largest: int
    tokens: int
    skipped: int
    sequences: int


class StepLayout:
    """
    Lays out the microbatches of optimizer steps.

    Args:
        orders (`bool`): Whether sequences of similar length share a microbatch. If not, TRL's microbatches stay.
        equal (`bool`): Whether all microbatches hold equally many sequences.
        mean_of_sequences (`bool`): Whether the loss is a mean over a microbatch's sequences. Advantages are then
            scaled, so that each sequence counts in the step as it does in TRL's microbatches.
        seed (`int`): The order of the microbatches is a function of it and of the step, the same on all ranks: they
            work on sequences of similar length at the same time.
    """

    def __init__(self, *, orders: bool, equal: bool, mean_of_sequences: bool, seed: int):
        self._orders = orders
        self._equal = equal
        self._mean_of_sequences = mean_of_sequences
        self._seed = seed

    def arrange(
        self, microbatches: Sequence[dict[str, Any]], step: int, skippable: Sequence[bool]
    ) -> tuple[list[Microbatch], Positions]:
        """
        Args:
            microbatches (`Sequence[dict]`): TRL's microbatches of one optimizer step, as its loss takes them.
            step (`int`): The optimizer step's number.
            skippable (`Sequence[bool]`): Which of their sequences have no gradient. They are left out, but for one
                in a microbatch that would be empty.

        Returns:
            As many microbatches, and the positions that they take.
        """
        sizes = [len(inputs["completion_mask"]) for inputs in microbatches]
        lengths = [pair for inputs in microbatches for pair in _lengths(inputs)]
        rows, n = _chunks(range(len(lengths)), sizes), len(microbatches)
        sequences = join(microbatches) if self._orders or any(skippable) else None
        if sequences is None:
            unchanged = [Microbatch(inputs, sum(_counted(inputs))) for inputs in microbatches]
            return unchanged, self._positions(microbatches, rows, rows, lengths)
        if self._orders and can_order(sequences):
            kept = _kept(range(len(lengths)), skippable, lengths, n)
            laid_out = [[kept[i] for i in group] for group in divide([lengths[i] for i in kept], n, self._equal)]
            generator = torch.Generator().manual_seed(1_000_003 * self._seed + step)
            laid_out = [laid_out[i] for i in torch.randperm(n, generator=generator).tolist()]
            # The first microbatch is what sequence gradients are checked on, which one sequence alone does not allow
            several = next((i for i, group in enumerate(laid_out) if len(group) > 1), 0)
            laid_out[0], laid_out[several] = laid_out[several], laid_out[0]
        else:
            laid_out = [_kept(group, skippable, lengths, 1) for group in rows]
        counted = _counted(sequences)
        found = []
        for group in laid_out:
            inputs = take(sequences, group)
            scale = len(group) * n / len(lengths)
            if self._mean_of_sequences and scale != 1:
                inputs["advantages"] = inputs["advantages"] * scale
            found.append(Microbatch(inputs, sum(counted[i] for i in group)))
        return found, self._positions(microbatches, rows, laid_out, lengths)

    @staticmethod
    def _positions(
        microbatches: Sequence[dict[str, Any]],
        rows: Sequence[Sequence[int]],
        laid_out: Sequence[Sequence[int]],
        lengths: Sequence[tuple[int, int]],
    ) -> Positions:
        def taken(groups: Sequence[Sequence[int]]) -> list[int]:
            return [positions([lengths[i] for i in group]) for group in groups]

        return Positions(
            padded=sum(x["prompt_mask"].numel() + x["completion_mask"].numel() for x in microbatches),
            trimmed=sum(taken(rows)),
            laid_out=sum(taken(laid_out)),
            largest=max(taken(laid_out)),
            tokens=sum(sum(lengths[i]) for group in laid_out for i in group),
            skipped=len(lengths) - sum(map(len, laid_out)),
            sequences=len(lengths),
        )


def _lengths(inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """Real tokens of each sequence's prompt and completion; a completion takes one position at least."""
    both = torch.stack([inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum(1)], 1)
    return [(max(1, prompt), max(1, completion)) for prompt, completion in both.tolist()]


def _counted(sequences: dict[str, Any]) -> list[int]:
    """The tokens of each sequence that the loss counts."""
    mask = sequences["completion_mask"]
    return (mask * sequences["tool_mask"] if "tool_mask" in sequences else mask).sum(1).tolist()


def _kept(rows: Sequence[int], skippable: Sequence[bool], lengths: Sequence[tuple[int, int]], least: int) -> list[int]:
    """Those of some rows that can't be skipped, or else the shortest, `least` in number."""
    kept = [row for row in rows if not skippable[row]]
    rest = sorted((row for row in rows if skippable[row]), key=lambda row: (sum(lengths[row]), row))
    return sorted([*kept, *rest[: max(0, least - len(kept))]])


def _chunks(rows: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(sizes))
    return [list(rows[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def join(microbatches: Sequence[dict[str, Any]], counted_by: str = "completion_mask") -> dict[str, Any] | None:
    """
    The sequences of some microbatches in one, with what belongs to images in lists; `None` if they hold something that
    is not divided by sequence. `counted_by` names a tensor that is.
    """
    split = [split_images(inputs) for inputs in microbatches]
    joined = {}
    for name, first in split[0].items():
        values = [inputs[name] for inputs in split]
        if first is None or (isinstance(first, torch.Tensor) and first.dim() == 0):
            joined[name] = first
            continue
        if any(len(value) != len(inputs[counted_by]) for value, inputs in zip(values, split, strict=True)):
            return None
        tensors = isinstance(first, torch.Tensor)
        joined[name] = torch.cat(values) if tensors else [x for value in values for x in value]
    return joined


def can_order(sequences: dict[str, Any]) -> bool:
    """Where some prompts have images and others none, a microbatch of sequences of like length might have none."""
    images = sequences.get("num_images")
    return images is None or all(images) or not any(images)


def take(sequences: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some of the sequences, as TRL's loss takes them."""

    def taken(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.dim() == 0 else value[torch.tensor(rows, device=value.device)]
        return value if value is None else [value[i] for i in rows]

    return join_images({name: taken(value) for name, value in sequences.items()})
