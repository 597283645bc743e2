"""
How many positions a step runs for each real token, by how sequences are laid out in microbatches. Pure Python.

    python benchmarks/lengths.py
    python benchmarks/lengths.py --lengths lognormal:180:0.6:1024 --prompt-lengths lognormal:60:0.3:200
    python benchmarks/lengths.py --ranks 8

A rollout is drawn from distributions of lengths: `lognormal:MEDIAN:SIGMA:CAP`, or `constant:T`. The sequences of a
group share a prompt. TRL pads prompts on the left and completions on the right and shuffles the rollout; an optimizer
step takes `--step` of its sequences, `--microbatch` at a time. The layouts:

- padded: every microbatch is as wide as the rollout's longest prompt plus its longest completion, as in TRL
- trimmed: a microbatch is as wide as its own longest prompt plus its own longest completion
- ordered: trimmed, and the sequences of an optimizer step are sorted by the length of their completions
- balanced: ordered, with as many microbatches, but of any number of sequences: the largest microbatch is as small as
  it can be
- aligned: ordered by whole length, and all sequences start in the first column: a microbatch is as wide as its longest
  sequence
- packed: no padding

`--ranks` draws a rollout for each rank. A rank that has fewer positions than another waits for it: once in an
optimizer step where gradients are reduced after the last microbatch (DDP), in every microbatch where parameters are
gathered (ZeRO-3, FSDP2). The columns are the positions of the rank that all wait for, by the mean over ranks.
Microbatches come in a random order: the same on all ranks, or another on each. Time is taken to be proportional to
positions.
"""

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from proma_trl.trainer.step_layout import divide
from proma_trl.trainer.step_layout import positions as num_positions

# Completions and prompts: like GSM8K's; like the paper's run; like reasoning
CASES = (
    ("lognormal:180:0.6:1024", "lognormal:60:0.3:200"),
    ("lognormal:250:0.65:2048", "lognormal:60:0.4:512"),
    ("lognormal:900:0.8:4096", "lognormal:120:0.4:512"),
)
PROMPT_LENGTHS = CASES[0][1]


class Tokens(NamedTuple):
    """Numbers of a sequence's real tokens."""

    prompt: int
    completion: int


Microbatches = list[list[Tokens]]


@dataclass(frozen=True)
class Lengths:
    """
    A distribution of numbers of tokens.

    Args:
        median (`float`): Median.
        sigma (`float`): Standard deviation of the logarithm; 0 for a constant.
        cap (`int`): What is longer ends here.
    """

    median: float
    sigma: float
    cap: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """
        `lognormal:MEDIAN:SIGMA:CAP` or `constant:T`.

        Raises:
            argparse.ArgumentTypeError: If `text` is neither.
        """
        kind, *numbers = text.split(":")
        try:
            if kind == "constant":
                (count,) = map(int, numbers)
                found = cls(count, 0.0, count)
            elif kind == "lognormal":
                median, sigma, cap = numbers
                found = cls(float(median), float(sigma), int(cap))
            else:
                raise ValueError
            if not (0 < found.median < math.inf and 0 <= found.sigma < math.inf and found.cap >= 1):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither lognormal:MEDIAN:SIGMA:CAP, as in lognormal:180:0.6:1024, nor constant:T"
            ) from None
        return found

    def __str__(self) -> str:
        return f"lognormal:{self.median:g}:{self.sigma:g}:{self.cap}" if self.sigma else f"constant:{self.cap}"

    def draw(self, generator: random.Random) -> int:
        """A number of tokens, from 1 to `cap`."""
        return max(1, min(self.cap, round(self.median * math.exp(self.sigma * generator.gauss(0.0, 1.0)))))


def tokens(text: str) -> int | Lengths:
    """A number of tokens, or a distribution of them."""
    return int(text) if text.isdecimal() else Lengths.parse(text)


def draw_rollout(completions: Lengths, prompts: Lengths, sequences: int, group: int, seed: int) -> list[Tokens]:
    """
    The sequences of a rollout, a group after the other.

    Raises:
        ValueError: If groups don't fill it.
    """
    if sequences % group:
        raise ValueError(f"{sequences} sequences are no multiple of groups of {group}.")
    generator = random.Random(seed)
    lengths = [prompts.draw(generator) for _ in range(sequences // group)]
    return [Tokens(lengths[i // group], completions.draw(generator)) for i in range(sequences)]


# Layouts of an optimizer step


def aligned_positions(microbatch: Sequence[Tokens]) -> int:
    """Positions of a microbatch whose sequences start in the first column."""
    return len(microbatch) * max(sum(x) for x in microbatch)


def real_tokens(sequences: Sequence[Tokens]) -> int:
    """Prompts and completions without padding."""
    return sum(sum(x) for x in sequences)


def chunks(indices: Sequence[int], count: int) -> list[list[int]]:
    """
    `count` parts of one size, in order.

    Raises:
        ValueError: If there are none.
    """
    if len(indices) % count:
        raise ValueError(f"{len(indices)} sequences can't be divided into {count} microbatches of one size.")
    size = len(indices) // count
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]


def trimmed(step: Sequence[Tokens], count: int) -> Microbatches:
    """Microbatches of an optimizer step as TRL makes them."""
    return [[step[i] for i in part] for part in chunks(range(len(step)), count)]


def ordered(step: Sequence[Tokens], count: int) -> Microbatches:
    """The same, of sequences of like length."""
    return [[step[i] for i in part] for part in divide(step, count, equal=True)]


def balanced(step: Sequence[Tokens], count: int) -> Microbatches:
    """The same, of about as many positions."""
    return [[step[i] for i in part] for part in divide(step, count)]


def aligned(step: Sequence[Tokens], count: int) -> Microbatches:
    """Microbatches of sequences of like whole length."""
    order = sorted(range(len(step)), key=lambda i: (sum(step[i]), i))
    return [[step[i] for i in part] for part in chunks(order, count)]


LAYOUTS: dict[str, Callable[[Sequence[Tokens], int], Microbatches]] = {
    "padded": trimmed,
    "trimmed": trimmed,
    "ordered": ordered,
    "balanced": balanced,
    "aligned": aligned,
    "packed": trimmed,
}


def step_positions(rollout: Sequence[Tokens], layout: str, step: int, microbatch: int, seed: int) -> list[list[int]]:
    """
    Positions of each microbatch of each optimizer step on a rollout.

    Args:
        rollout (`Sequence[Tokens]`): Its sequences, which are shuffled here.
        layout (`str`): One of `LAYOUTS`.
        step, microbatch (`int`): Sequences of an optimizer step, and of a microbatch on average.
        seed (`int`): Of the shuffle.
    """
    rollout = list(rollout)
    random.Random(seed).shuffle(rollout)
    widest = num_positions(rollout) // len(rollout)
    found = []
    for start in range(0, len(rollout), step):
        parts = LAYOUTS[layout](rollout[start : start + step], step // microbatch)
        if layout == "padded":
            found.append([len(part) * widest for part in parts])
        elif layout == "packed":
            found.append([real_tokens(part) for part in parts])
        elif layout == "aligned":
            found.append([aligned_positions(part) for part in parts])
        else:
            found.append([num_positions(part) for part in parts])
    return found


def waits(ranks: Sequence[list[list[int]]], seed: int, same_order: bool = True) -> tuple[float, float]:
    """
    Positions of the rank that the others wait for, by the mean over ranks: if they wait once in an optimizer step, and
    if they wait in every microbatch.

    Args:
        ranks (`Sequence[list[list[int]]]`): What `step_positions` returned for each rank.
        seed (`int`): Of the order of microbatches.
        same_order (`bool`): Whether that is the same on all ranks.
    """
    once, always, total = 0, 0, 0.0
    generator = random.Random(seed)
    for steps in zip(*ranks, strict=True):
        order = generator.sample(range(len(steps[0])), len(steps[0]))
        orders = [order if same_order else generator.sample(order, len(order)) for _ in steps]
        once += max(map(sum, steps))
        together = zip(*([step[i] for i in order] for step, order in zip(steps, orders, strict=True)), strict=True)
        always += sum(map(max, together))
        total += statistics.mean(map(sum, steps))
    return once / total, always / total


# The tables


def mean_positions(
    lengths: str,
    prompt_lengths: str,
    sequences: int,
    group: int,
    step: int,
    microbatch: int,
    seeds: int,
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> dict[str, tuple[float, float]]:
    """
    Positions for each real token, and those of the largest microbatch by the padded one's, for each layout: means over
    rollouts.
    """
    ratios: dict[str, list[float]] = {name: [] for name in layouts}
    peaks: dict[str, list[float]] = {name: [] for name in layouts}
    for seed in range(seeds):
        rollout = draw_rollout(Lengths.parse(lengths), Lengths.parse(prompt_lengths), sequences, group, seed)
        real, largest = real_tokens(rollout), microbatch * (num_positions(rollout) // len(rollout))
        for name in layouts:
            steps = step_positions(rollout, name, step, microbatch, seed)
            ratios[name].append(sum(map(sum, steps)) / real)
            peaks[name].append(max(map(max, steps)) / largest)
    return {name: (statistics.mean(ratios[name]), statistics.mean(peaks[name])) for name in layouts}


def mean_waits(
    lengths: str, prompt_lengths: str, sequences: int, group: int, step: int, microbatch: int, seeds: int, ranks: int
) -> dict[str, tuple[float, float]]:
    """What `waits` returns for each layout, also with an order of each rank: means over rollouts."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        rollouts = [
            draw_rollout(Lengths.parse(lengths), Lengths.parse(prompt_lengths), sequences, group, seed * ranks + rank)
            for rank in range(ranks)
        ]
        for name in LAYOUTS:
            steps = [
                step_positions(rollout, name, step, microbatch, seed * ranks + rank)
                for rank, rollout in enumerate(rollouts)
            ]
            found.setdefault(name, []).append(waits(steps, seed))
            if name in ("ordered", "balanced"):
                found.setdefault(f"{name}, other orders", []).append(waits(steps, seed, same_order=False))
    return {name: tuple(map(statistics.mean, zip(*values, strict=True))) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", help="of completions; three cases without it")
    parser.add_argument("--prompt-lengths", default=PROMPT_LENGTHS, help="of prompts, with --lengths")
    parser.add_argument("--sequences", type=int, default=1024, help="sequences of a rollout, on each rank")
    parser.add_argument("--group", type=int, default=8, help="sequences of a prompt")
    parser.add_argument("--step", type=int, default=128, help="sequences of an optimizer step")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences of a microbatch, k")
    parser.add_argument("--rollouts", type=int, default=10, help="how many to take the mean of")
    parser.add_argument("--ranks", type=int, help="print how long ranks wait for each other")
    arguments = parser.parse_args()
    cases = [(text, arguments.prompt_lengths) for text in arguments.lengths] if arguments.lengths else CASES
    sizes = (arguments.sequences, arguments.group, arguments.step, arguments.microbatch, arguments.rollouts)
    for lengths, prompt_lengths in cases:
        print(f"completions {lengths}, prompts {prompt_lengths}")
        if arguments.ranks is None:
            print(f"{'layout':>24} {'positions a real token':>24} {'largest microbatch':>20}")
            for name, (ratio, peak) in mean_positions(lengths, prompt_lengths, *sizes).items():
                print(f"{name:>24} {ratio:>24.2f} {peak:>20.2f}")
        else:
            print(f"{'layout':>24} {'waiting once a step':>20} {'in every microbatch':>20}")
            for name, (once, always) in mean_waits(lengths, prompt_lengths, *sizes, arguments.ranks).items():
                print(f"{name:>24} {once:>20.3f} {always:>20.3f}")


if __name__ == "__main__":
    main()
