"""Checks of reward functions before training: what they are called with, and that each has a weight."""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOConfig

RewardFunction = str | PreTrainedModel | Callable[..., list[float | None]]

# What TRL passes beside the dataset's columns
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that it keeps to itself
_KEPT = ("prompt", "completion", "completion_ids")
# What `remove_unused_columns` leaves
_USED = ("prompt", "image", "images")


def check_rewards(
    reward_funcs: Sequence[RewardFunction],
    columns: Collection[str],
    dataset: str,
    names: Sequence[str] | None = None,
) -> None:
    """
    Check that TRL can call reward functions with a dataset's columns.

    Args:
        reward_funcs (`Sequence`): The reward functions. Reward models take texts, and are passed over.
        columns (`Collection[str]`): The dataset's columns.
        dataset (`str`): What messages call the dataset.
        names (`Sequence[str]`, *optional*): What messages call the functions, by default their own names.

    Raises:
        ValueError: If it can't, with a line for each reason.
    """
    names = names or [_name(func) for func in reward_funcs]
    problems = []
    for name, func in zip(names, reward_funcs, strict=True):
        problems += [f"{name} {problem}" for problem in _call_problems(func, columns, dataset)]
    if problems:
        raise ValueError("\n".join(problems))


def check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> None:
    """
    Check that there is a weight for each reward function.

    Raises:
        ValueError: If not.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"`reward_weights` has {len(weights)} value{'' if len(weights) == 1 else 's'} for {len(names)} reward "
            f"function{'' if len(names) == 1 else 's'} ({', '.join(names)}). Give one for each."
        )


def check_trainer_rewards(
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None,
    args: GRPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
) -> None:
    """
    The same check of what a trainer is made with. Datasets whose columns are not known beforehand, streams and those
    with a transform, are passed over.

    Raises:
        ValueError: As [`check_rewards`].
    """
    if reward_funcs is None:
        return
    funcs = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    datasets = {"`train_dataset`": train_dataset}
    datasets |= {f"`eval_dataset{f'[{name!r}]' if name else ''}`": data for name, data in evaluated.items()}
    check_weights(args.reward_weights, [_name(func) for func in funcs])
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
            columns = [name for name in dataset.column_names if name in _USED or not args.remove_unused_columns]
            check_rewards(funcs, columns, name)


def _name(func: RewardFunction) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    return func if isinstance(func, str) else getattr(func, "__name__", type(func).__name__)


def _call_problems(func: RewardFunction, columns: Collection[str], dataset: str) -> list[str]:
    """What is wrong with a call of the function, in words that follow its name."""
    if isinstance(func, (str, nn.Module)):
        return []
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # of a builtin, say
        return []
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    passed = {*GIVEN, *columns} - {*_KEPT} | {"completion_ids"}
    problems = []
    needed = [p.name for p in named.values() if p.default is p.empty and p.name not in passed]
    if needed:
        hints = [f"`{name}s`" for name in needed if f"{name}s" in GIVEN]
        problems.append(
            f"needs {_columns(needed)}; {dataset} has {', '.join(columns)}. "
            + (f"Prompts and completions come as {' and '.join(hints)}." if hints else "Add or rename columns.")
        )
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        problems.append(f"takes `{'`, `'.join(positional)}` by position only, and is called with keywords.")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        refused = [name for name in (*GIVEN, *columns) if name in passed and name not in named]
        if refused:
            problems.append(f"takes no `{'`, `'.join(refused)}`, which it is called with. Give it a last `**kwargs`.")
    return problems


def _columns(names: Sequence[str]) -> str:
    return f"a column `{names[0]}`" if len(names) == 1 else f"columns `{'`, `'.join(names)}`"


class RewardError(ValueError):
    """A reward function has returned something other than one reward for each completion."""


def returning_rewards(func: Callable[..., list[float | None]], name: str) -> Callable[..., list[float | None]]:
    """
    A reward function that says so where it has not returned one reward for each completion.

    Args:
        func (`Callable`): The reward function, which may be asynchronous.
        name (`str`): What the message calls it.

    Raises:
        RewardError: By the function that is returned.
    """

    def checked(*args, **kwargs):
        return _checked(func(*args, **kwargs), name, len(kwargs["completions"]))

    async def checked_later(*args, **kwargs):
        return _checked(await func(*args, **kwargs), name, len(kwargs["completions"]))

    inner = func
    while isinstance(inner, functools.partial):
        inner = inner.func
    later = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)
    wrapper = functools.update_wrapper(checked_later if later else checked, func)
    wrapper.__name__ = _name(func)  # which an instance or a partial lacks
    return wrapper


def _checked(rewards: Any, name: str, asked: int) -> list[float | None]:
    try:
        given = [None if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError):
        shown = repr(rewards)
        shown = f"{shown[:60]}..." if len(shown) > 60 else shown
        raise RewardError(
            f"{name} returned {shown}, and not a list with one number (or None) for each of the {asked} completions."
        ) from None
    if len(given) != asked:
        raise RewardError(f"{name} returned {len(given)} rewards for {asked} completions. Return one for each.")
    return given
