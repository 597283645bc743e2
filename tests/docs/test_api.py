"""The API reference has every public name."""

import re
from pathlib import Path

import proma_trl

API = Path(__file__).parents[2] / "docs" / "api"


def test_every_public_name_is_in_the_reference():
    pages = [page.read_text(encoding="utf-8") for page in API.glob("*.md")]
    documented = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    assert len(documented) == len(set(documented))
    assert {f"proma_trl.{name}" for name in proma_trl.__all__ if not name.startswith("__")} <= set(documented)
