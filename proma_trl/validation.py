"""Checks of settings: what is not of the right kind, or out of range, is an error that names the setting."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


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


def _message(name: str, kind: str, value: Any, way_out: str) -> str:
    return f"`{name}` must be {kind}, got {value!r}.{' ' if way_out else ''}{way_out}"
