"""Reward functions for problems whose answer is a number: is the final answer right, is it written as asked.

They follow TRL's convention: called with the completions and the dataset's columns as keyword arguments, they return
one reward per completion.
"""

import logging
import re
import threading
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

Completion = str | list[dict[str, str]]

# A final answer stands at the end, so this much of a completion without a marked answer is searched for one.
_SEARCHED_CHARACTERS = 1000
_TIMEOUT_SECONDS = 5

_MARKED_ANSWER = re.compile(r"####[ \t]*\n?(?P<line>[^\n]*)|\\boxed\s*(?P<boxed>\{)")
_FORMATTED = re.compile(r"#### -?\$?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")
_EXTRACTION = (
    LatexExtractionConfig(normalization_config=NormalizationConfig(units=True), boxed_match_priority=0),
    ExprExtractionConfig(),
)


def completion_text(completion: Completion) -> str:
    """Returns what the policy wrote, from a plain completion or a conversational one (a list of messages)."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message.get("content") or "" for message in completion)


def final_answer(text: str) -> str | None:
    """
    Finds the part of a solution that states its final answer.

    The last of the marked answers counts, `#### x` or `\\boxed{x}`. Of a text without a marked answer the last
    1,000 characters are returned, the part that is searched for one. `None` where nothing follows the mark.
    """
    text = text.replace("−", "-").replace("**", "")
    marks = list(_MARKED_ANSWER.finditer(text))
    if not marks:
        return text[-_SEARCHED_CHARACTERS:]
    marked = marks[-1]
    if marked["boxed"]:
        return text[marked.start() : marked.start() + _SEARCHED_CHARACTERS]
    # A currency sign is a unit here, and would be read as the start of a formula.
    answer = re.sub(r"\\?[$€£¥]", "", marked["line"]).strip().removeprefix("+")
    return answer[:_SEARCHED_CHARACTERS] or None


def _is_number(expression: object) -> bool:
    """Whether a parsed answer is one number. A sum left undone is no answer, and evaluating it may take forever."""
    if not isinstance(expression, sympy.Expr):
        return False
    if expression.is_Number:
        return True
    if isinstance(expression, sympy.Mul) and len(expression.args) == 2 and expression.args[0].is_Number:
        factor = expression.args[1]
        is_reciprocal = isinstance(factor, sympy.Pow) and factor.base.is_Number and factor.exp == -1
        is_percent = factor == sympy.UnevaluatedExpr(sympy.Rational(1, 100))
        return is_reciprocal or is_percent
    return False


def parse_number(text: str) -> list[sympy.Expr]:
    """
    Reads the number that a solution gives as its final answer.

    Args:
        text (`str`):
            A solution, or just its answer: numbers with thousands separators, units and currencies, fractions,
            percentages, LaTeX.

    Returns:
        `list[sympy.Expr]`:
            The number in a list, as math-verify's `verify` takes it. Empty where there is none.
    """
    answer = final_answer(text)
    return [] if answer is None else [*_read_number(answer)]


# Samples of a group often have the same answer, and all have the same correct one
@lru_cache(maxsize=4096)
def _read_number(answer: str) -> tuple[sympy.Expr, ...]:
    parsed = parse(answer, extraction_config=_EXTRACTION, extraction_mode="first_match", parsing_timeout=_timeout())
    # math-verify also returns the matched string, and an equation where the solution states one: "x = 18".
    values = [value.rhs if isinstance(value, sympy.Eq) else value for value in parsed]
    return tuple(value for value in values if _is_number(value))


def _timeout() -> int | None:
    # math-verify's timeouts are signals, which only the main thread receives. Elsewhere it warns about that, with no
    # need here: the searched text is short, and only numbers are compared.
    if threading.current_thread() is threading.main_thread():
        return _TIMEOUT_SECONDS
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return None


def accuracy_reward(completions: list[Completion], answer: list[str], **kwargs) -> list[float | None]:
    """
    Rewards a completion with 1 if its final answer equals the correct one, and with 0 otherwise.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Plain or conversational completions.
        answer (`list[str]`):
            The correct answer to each: a number, or a solution that states it, such as GSM8K's `... #### 1,234`.
        **kwargs:
            Other columns, not used.

    Returns:
        `list[float | None]`:
            One reward per completion; `None` where the correct answer is no number, which leaves the sample unscored.
    """
    rewards = []
    for completion, correct in zip(completions, answer, strict=True):
        gold = parse_number(correct)
        if not gold:
            rewards.append(None)
            continue
        rewards.append(float(verify(gold, parse_number(completion_text(completion)), timeout_seconds=_timeout())))
    return rewards


def format_reward(completions: list[Completion], **kwargs) -> list[float]:
    """
    Rewards a completion with 1 if it states its final answer as asked: `#### <number>`, once, as its last line.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Plain or conversational completions.
        **kwargs:
            Other columns, not used.

    Returns:
        `list[float]`: One reward per completion.
    """
    rewards = []
    for completion in completions:
        text = completion_text(completion).strip()
        last_line = text.rsplit("\n", maxsplit=1)[-1].strip()
        rewards.append(float(text.count("####") == 1 and _FORMATTED.fullmatch(last_line) is not None))
    return rewards
