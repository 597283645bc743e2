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

_MARKED_ANSWER = re.compile(
    r"####[ \t]*\n?(?P<line>(?:(?!<answer>)[^\n])*)|\\(?:boxed|fbox)\s*(?P<boxed>\{)|"
    r"<answer>(?P<tagged>.*?)(?:</answer>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_FORMATTED = re.compile(r"#### -?\$?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")
_EXTRACTION = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True, malformed_operators=True), boxed_match_priority=0
    ),
    ExprExtractionConfig(),
)

# What math-verify does not read: separators of thousands beside the comma, numbers within \text, Markdown, currencies
_SPACE = r"\\[,;:! ]|\\thinspace(?![a-zA-Z])|~|[\u00a0\u2007\u2008\u2009\u202f]"
_SEPARATOR = rf"\{{(?:,|{_SPACE})\}}|,\\!|{_SPACE}|\\?_|['’]"
_THOUSANDS = re.compile(rf"(?<![\d.,'’])([1-9]\d{{0,2}})({_SEPARATOR})(\d{{3}}(?:\2\d{{3}})*)(?!\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])([1-9]\d{0,2})( )(\d{3}(?: \d{3})*)(?![ .,]?\d)")
_CURRENCY = re.compile(r"\\[$€£¥₹]|[€£¥₹]|\\(?:pounds|euro|text(?:euro|sterling|dollar|yen))(?![a-zA-Z])(?:\{\})?")
_WITHIN_BRACES = r"(?:[^{}]|\{[^{}]*\})*"
_FONT = re.compile(rf"\\(?:math(?:bf|rm|it|sf)|bm|boldsymbol)\s*\{{(?=[^{{}}]*\d|\\)({_WITHIN_BRACES})\}}")
_NUMBER_IN_TEXT = re.compile(
    rf"\\(?:text(?:bf|it|rm|normal)?|mbox)\s*\{{(?=\s*[-+]?\s*\$?\s*\.?\d)({_WITHIN_BRACES})\}}"
)
_EMPHASIS = re.compile(r"(?<![\w*])(\*|__|`)(?=\S)([^*`\n]+?)(?<=\S)\1(?![\w*])")
_TAG = re.compile(r"</?(?:b|i|em|strong|code|u|p|span|final_answer)>", re.IGNORECASE)

# Of a marked answer: words around its number, and several numbers instead of one
_LABEL = re.compile(r"^(?:[A-Za-z][A-Za-z ]*:|(?:USD|EUR|GBP|INR|Rs\.?)(?![A-Za-z]))\s*")
_TEXT_LABEL = re.compile(r"^\\text\s*\{\s*([A-Za-z][A-Za-z ]*:|USD|EUR|GBP|INR|Rs\.?)\s*\}")
_WORDS = re.compile(
    r"(?<=\d)\s*(?:°[CF]?|(?:/\s*|\s)(?:\\text\s*\{[^{}\d]*\}|(?:a )?[A-Za-z]{2,}(?:[ -][A-Za-z]+)*))\.?$"
)
# They change the number, or stand before another one
_NO_UNITS = re.compile(
    r"\b(?:pi|hundred|thousand|million|billion|trillion|dozen|half|halves|quarters?|thirds?|squared|cubed|factorial|"
    r"and|or|to|not)\b"
)
_NUMBER = r"[-+]?\$?(?:\d+(?:,\d{3})+(?!\d)|\d+(?:[.,]\d+)?|\.\d+)"
_SEVERAL = re.compile(rf"[^\d=]*?{_NUMBER}(?:(?:\s*(?:[;&]|\bor\b|\band\b|\bto\b)\s*|,?\s+){_NUMBER})+[^\d=/]*")
_SEVERAL_WITH_UNITS = re.compile(r"\d\s*\\(?:text|mbox)\s*\{[^{}]*\}(?!\s*\^)[^=]*\d[^=]*$")


def completion_text(completion: Completion) -> str:
    """Returns what the policy wrote, from a plain completion or a conversational one (a list of messages)."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message.get("content") or "" for message in completion)


def final_answer(text: str) -> str | None:
    """
    Finds the part of a solution that states its final answer.

    The last of the marked answers counts, `#### x`, `\\boxed{x}` or `<answer>x</answer>`. Of a text without a marked
    answer the last 1,000 characters are returned, the part that is searched for one. `None` where nothing follows the
    mark, or several numbers do.
    """
    text = _without_markup(text)
    marks = list(_MARKED_ANSWER.finditer(text))
    # Marks within a tag, or behind one that is only spoken of
    while marks and (tagged := marks[-1]["tagged"]) is not None and _MARKED_ANSWER.search(tagged):
        text, marks = tagged, list(_MARKED_ANSWER.finditer(tagged))
    if not marks:
        return text[-_SEARCHED_CHARACTERS:]
    marked = marks[-1]
    if marked["boxed"]:
        boxed, rest = _within_braces(text[marked.end() : marked.start() + _SEARCHED_CHARACTERS])
        answer = _without_words(boxed)
        return None if answer is None else f"\\boxed{{{answer}{rest}"
    if marked["tagged"] is not None:
        answer = marked["tagged"].strip()[-_SEARCHED_CHARACTERS:]
        return (_without_words(answer) if "\n" not in answer else answer) or None
    # A currency sign is a unit here, and would be read as the start of a formula.
    return _without_words(marked["line"].replace("$", "")[:_SEARCHED_CHARACTERS]) or None


def _without_markup(text: str) -> str:
    """The text with its numbers as math-verify reads them."""
    text = text.replace("−", "-").replace("**", "")
    text = _EMPHASIS.sub(r"\2", _TAG.sub(" ", _CURRENCY.sub("", text)))
    text = _THOUSANDS.sub(_joined, text)
    # Elsewhere, math-verify leaves out quotes: 1'08 is not 108
    text = re.sub(r"(?<=\d)['’](?=\d)", " ", text)
    return _NUMBER_IN_TEXT.sub(r" \1 ", _FONT.sub(r" \1 ", text))


def _joined(match: re.Match) -> str:
    return match[1] + match[3].replace(match[2], "")


def _within_braces(text: str) -> tuple[str, str]:
    """Splits what follows an opening brace at the closing one, which is part of the second piece."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:i], text[i:]
    return text, ""


def _without_words(answer: str) -> str | None:
    """A marked answer without what is no part of its number, or `None` where it gives several."""
    answer = re.sub(r"^\{([^{}]*)\}$", r"\1", answer.strip()).strip().removeprefix("+")
    answer = re.sub(r"^[‐-—]\s*(?=[\d.])", "-", _LABEL.sub("", _TEXT_LABEL.sub("", answer)).strip())
    answer = _SPACED_THOUSANDS.sub(_joined, re.sub(_SPACE, " ", answer))
    if _SEVERAL.fullmatch(answer) or _SEVERAL_WITH_UNITS.search(answer):
        return None
    units = _WORDS.search(answer)
    if units and not _NO_UNITS.search(units[0].lower()):
        answer = answer[: units.start()]
    return re.sub(r"(?<=\d)[.,]$", "", answer)


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
