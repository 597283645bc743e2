"""
Optimizer steps on rollouts whose lengths are drawn from distributions, for `step_time.py` and `memory.py`.

TRL is given a rollout by its `rollout_func` and pads, rewards, shuffles and splits it. All that a trainer does with it
from there on is part of the step.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
from common import REFERENCE, clock, make_parser, make_prepared_trainer, method_settings, trainer_classes, update
from lengths import PROMPT_LENGTHS, Lengths, draw_rollout, real_tokens, tokens
from trl import GRPOTrainer

from proma_trl import PROMAConfig
from proma_trl.trainer.trl_internals import replaced

# Settings of `PROMAConfig` that lay out a rollout's microbatches
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "padded": {"order_by_length": False},
    "trimmed": {"order_by_length": False},
    "ordered": {"order_by_length": True},
}

T = TypeVar("T")


def make_rollout_parser(description: str) -> argparse.ArgumentParser:
    """The same options, of which `--lengths` also takes distributions, and those of rollouts drawn from them."""
    parser = make_parser(description, tokens)
    parser.add_argument(
        "--prompt-lengths",
        type=Lengths.parse,
        default=PROMPT_LENGTHS,
        help="tokens of a prompt, where --lengths are distributions",
    )
    parser.add_argument(
        "--layout",
        nargs="+",
        default=["padded", "trimmed", "ordered"],
        choices=LAYOUTS,
        help="how sequences of these lengths share microbatches",
    )
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps on a rollout")
    parser.add_argument(
        "--zero-advantages",
        type=float,
        nargs="+",
        default=[0.0],
        help="the part of groups whose rewards are all alike; with several, GRPO has the first",
    )
    return parser


def layouts(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    The layouts that the options ask for, and their settings. With an earlier version of the package, those are left
    out that it has no settings for.
    """
    for name in arguments.layout:
        settings = dict(LAYOUTS[name])
        unknown = [field for field in settings if field not in PROMAConfig.__dataclass_fields__]
        if not unknown:
            yield name, settings
        elif name == "padded":
            yield name, {}
        else:
            print(f"Left out: {name}. This version's `PROMAConfig` has no `{'`, `'.join(unknown)}`.")


def padded(trainer_class: type[GRPOTrainer]) -> type[GRPOTrainer]:
    """The trainer as TRL runs it: on all columns, those without a token included, and with TRL's microbatches."""
    names = ("_get_per_token_logps_and_entropies", "_prepare_inputs")
    return type(trainer_class.__name__, (trainer_class,), {name: getattr(GRPOTrainer, name) for name in names})


class Turn(NamedTuple):
    """What was measured of optimizer steps on one rollout: seconds of a step, peak of memory on CUDA, positions."""

    seconds: float
    peak: int
    positions: float | None


class Rollouts:
    """
    Rollouts whose lengths are drawn from distributions, and whose tokens are random. TRL takes them from its
    `rollout_func`, and pads, rewards, shuffles and splits them as it does with any other.

    Args:
        arguments (`argparse.Namespace`): Options of `make_rollout_parser`.
        completions (`Lengths`): Lengths of completions.
        zero_advantages (`float`): The part of groups whose rewards are all alike.
    """

    def __init__(self, arguments: argparse.Namespace, completions: Lengths, zero_advantages: float):
        self.arguments, self.completions, self.zero_advantages = arguments, completions, zero_advantages
        self.size = arguments.sequences * arguments.microbatches * arguments.steps
        self.next(0)

    def next(self, seed: int) -> None:
        """Draw the rollout that the trainer is given next."""
        arguments = self.arguments
        group, generator = arguments.sequences, random.Random(seed)
        self._sequences = draw_rollout(self.completions, arguments.prompt_lengths, self.size, group, seed)
        self.num_tokens = real_tokens(self._sequences)

        def ids(count: int) -> list[int]:
            return [generator.randrange(3, arguments.vocabulary) for _ in range(count)]

        prompts = [ids(self._sequences[start].prompt) for start in range(0, self.size, group)]
        self._prompt_ids = [prompts[i // group] for i in range(self.size)]
        self._completion_ids = [ids(x.completion) for x in self._sequences]
        count = self.size // group
        alike = set(generator.sample(range(count), round(self.zero_advantages * count)))
        self._rewards = [0.0 if i // group in alike else generator.gauss(0.0, 1.0) for i in range(self.size)]

    def sample(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's `rollout_func`. A random model finds all tokens about as probable."""
        log_prob = -math.log(self.arguments.vocabulary)
        log_probs = [[log_prob] * x.completion for x in self._sequences]
        return {"prompt_ids": self._prompt_ids, "completion_ids": self._completion_ids, "logprobs": log_probs}

    def rewards(self, completions: list, **_: Any) -> list[float]:
        """TRL's reward function."""
        return self._rewards


class RolloutSteps:
    """
    Optimizer steps of a trainer on rollouts, one rollout a call, by the way that `train()` takes: from TRL's padded
    rollout on. It is the same rollout, in the same order, for all trainers that were called as often.

    Args:
        trainer (`GRPOTrainer`): A prepared trainer that samples from `rollouts`.
        rollouts ([`Rollouts`]): Its rollouts.
    """

    def __init__(self, trainer: GRPOTrainer, rollouts: Rollouts):
        self.trainer, self.rollouts, self.calls = trainer, rollouts, 0

    def __call__(self) -> Turn:
        trainer, arguments = self.trainer, self.rollouts.arguments
        self.rollouts.next(self.calls)
        torch.manual_seed(self.calls)
        self.calls += 1
        batch = [{"prompt": "token3"}] * self.rollouts.size
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with counted_positions(trainer.model) as positions, untimed_sampling(trainer, arguments.device) as sampling:
            start = clock(arguments.device)
            for _ in range(arguments.steps):
                for i in range(arguments.microbatches):
                    trainer.accelerator.gradient_state._set_sync_gradients(i == arguments.microbatches - 1)
                    trainer.training_step(trainer.model, batch, None)
                update(trainer)
            elapsed = clock(arguments.device) - start - sum(sampling)
        trainer._metrics["train"].clear()
        peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
        return Turn(elapsed / arguments.steps, peak, sum(positions) / self.rollouts.num_tokens)


@contextmanager
def counted_positions(model: torch.nn.Module) -> Iterator[list[int]]:
    """Within the context, the positions of each of the model's forward passes."""
    positions: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield positions
    finally:
        hook.remove()


@contextmanager
def untimed_sampling(trainer: GRPOTrainer, device: str) -> Iterator[list[float]]:
    """Within the context, the seconds that go into sampling and rewards, which are no part of a step here."""
    seconds: list[float] = []

    def timed(function: Callable[..., T]) -> Callable[..., T]:
        def call(*args: Any, **kwargs: Any) -> T:
            start = clock(device)
            result = function(*args, **kwargs)
            seconds.append(clock(device) - start)
            return result

        return call

    with ExitStack() as stack:
        for name in ("_generate", "_calculate_rewards"):
            stack.enter_context(replaced(trainer, name, timed(getattr(trainer, name))))
        yield seconds


def make_rollout_steps(
    arguments: argparse.Namespace,
    completions: Lengths,
    algorithm: str,
    layout: str = "padded",
    zero_advantages: float = 0.0,
    **settings: Any,
) -> RolloutSteps:
    """A trainer of an algorithm and a layout, with the layout's `settings`, ready for optimizer steps on rollouts."""
    trainer_class, config_class = trainer_classes(algorithm)
    if algorithm != REFERENCE:
        settings |= method_settings(arguments, algorithm)
        trainer_class = padded(trainer_class) if layout == "padded" else trainer_class
    rollouts = Rollouts(arguments, completions, zero_advantages)
    settings["steps_per_generation"] = arguments.microbatches * arguments.steps
    settings |= {"reward_func": rollouts.rewards, "rollout_func": rollouts.sample}
    trainer = make_prepared_trainer(trainer_class, config_class, arguments, completions.cap, **settings)
    return RolloutSteps(trainer, rollouts)


def rollout_variants(arguments: argparse.Namespace) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """What the options compare on rollouts: algorithm, layout, part of zero advantages, and the layout's settings."""
    yield REFERENCE, "padded", arguments.zero_advantages[0], {}
    for layout, settings in layouts(arguments):
        for algorithm, zero in product(arguments.algorithm, arguments.zero_advantages):
            yield algorithm, layout, zero, settings
