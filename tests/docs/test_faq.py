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


def test_every_message_is_explained():
    """Text, not another quote or heading, comes after each quote, or after the two of one entry."""
    for block in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        rest = re.sub(r"```.*?```", "", block.partition("\n")[2], flags=re.DOTALL).partition("\n## ")[0]
        assert len(rest.split()) >= 3, block
