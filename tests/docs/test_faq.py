"""The messages that the page on errors quotes are the package's own."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
QUOTES = [" ".join(quote.split()) for quote in re.findall(r"^```text\n(.*?)\n```", PAGE, re.DOTALL | re.MULTILINE)]


def templates():
    """The strings in the package, with `…` for what is formatted into them."""
    for path in (ROOT / "proma_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(value.value if isinstance(value, ast.Constant) else "…" for value in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_quote_is_the_start_of_a_message():
    messages = [" ".join(template.split()) for template in templates()]
    strangers = [quote for quote in QUOTES if not any(message.startswith(quote) for message in messages)]
    assert strangers == []
    assert all(len(re.findall(r"[a-z]{2,}", quote)) >= 3 for quote in QUOTES)
    assert len(QUOTES) == len(set(QUOTES)) >= 30


def explained(entry):
    """The quotes of an entry, one or two at a time, each with the text behind."""
    parts = re.split(r"```text\n(.*?)\n```", entry.partition("\n")[2].partition("\n## ")[0], flags=re.DOTALL)
    quotes, together = [], []
    for quote, text in zip(parts[1::2], parts[2::2], strict=True):
        together.append(" ".join(quote.split()))
        if text.strip() or len(together) == 2:
            quotes.append((" ".join(together), text.strip()))
            together = []
    return [*quotes, *((quote, "") for quote in together)]


def says_more(quote, text):
    """Whether a text has a sentence with words that a quote does not have."""
    words = set(re.findall(r"[a-z]{3,}", text.lower())) - set(re.findall(r"[a-z]{3,}", quote.lower()))
    return len(words) >= 5 and text.endswith(".")


def test_every_message_is_explained():
    entries = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    found = [pair for entry in entries for pair in explained(entry)]
    assert sum(quote.count("`") for quote, _ in found) > 40
    assert [quote for quote, text in found if not says_more(quote, text)] == []


def test_what_explains_nothing_is_found():
    quote = "```text\nThe model is wrong.\n```\n"
    text = "Its head has no weight, so train another one.\n"
    assert [says_more(*pair) for pair in explained(f"Title\n\n{quote}\n{text}")] == [True]
    assert [says_more(*pair) for pair in explained(f"Title\n\n{quote}\n{quote}\n{text}")] == [True]
    assert [says_more(*pair) for pair in explained(f"Title\n\n{quote}\n{quote}\n{quote}\n{text}")] == [False, True]
    for nothing in ("", "See above now.", "The model is wrong.", "the model is wrong, the model is wrong, is it not."):
        assert not any(says_more(*pair) for pair in explained(f"Title\n\n{quote}\n{nothing}"))
