"""Checks of settings, which name the setting that is not of the right kind or out of range, and of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def check_whole(name: str, value: Any, way_out: str = "", low: int = 1) -> int:
    """
    Returns `value` as an `int`.

    Raises:
        ValueError: If it is not a whole number of at least `low`. Its message names the setting and ends with
            `way_out`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(_message(name, f"a whole number of at least {low}", value, way_out))
    return int(value)


def check_real(
    name: str, value: Any, kind: str, low: float = 0.0, high: float = float("inf"), way_out: str = ""
) -> float:
    """
    Returns `value` as a `float`.

    Args:
        name (`str`): The setting.
        value (`Any`): Its value.
        kind (`str`): What it has to be, for the message.
        low (`float`), high (`float`): Smallest and largest value; infinity is never allowed.
        way_out (`str`): What the message ends with.

    Raises:
        ValueError: If it is not a finite number between `low` and `high`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high or value == float("inf"):
        raise ValueError(_message(name, kind, value, way_out))
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """
    Returns `value`.

    Raises:
        ValueError: If it is none of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(_message(name, f"one of {', '.join(map(repr, choices))}", value, ""))
    return value


def encoder_decoder_refusal(model: nn.Module) -> str | None:
    """Returns why `GRPOTrainer` and what extends it can't train an encoder-decoder model; `None` for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return (
        f"`{type(model).__name__}` is an encoder-decoder model. TRL's `GRPOTrainer`, which the trainers of proma-trl "
        "extend, gives a model prompt and completion as one sequence, as decoder-only models take them. Use a "
        "decoder-only model."
    )


def check_trained(model: nn.Module) -> None:
    """
    Check that there is something to train.

    Raises:
        ValueError: If no parameter requires gradients, with the way out.
    """
    problem = nothing_to_train(model)
    if problem is not None:
        raise ValueError(problem)


def nothing_to_train(model: nn.Module) -> str | None:
    """Returns what [`check_trained`] raises, or `None`."""
    if any(param.requires_grad for param in model.parameters()):
        return None
    problem = f"There is nothing to train: no parameter of the model (`{type(model).__name__}`) requires gradients. "
    configs = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "inference_mode", False) for config in configs.values()):
        load = "model.load_adapter" if getattr(model, "_hf_peft_config_loaded", False) else "PeftModel.from_pretrained"
        return f"{problem}The adapter was loaded for inference: load it with `{load}(..., is_trainable=True)`."
    return f"{problem}Set `requires_grad` of those to train, or give the trainer a `peft_config` for new adapters."


def _message(name: str, kind: str, value: Any, way_out: str) -> str:
    return f"`{name}` must be {kind}, got {value!r}.{' ' if way_out else ''}{way_out}"
