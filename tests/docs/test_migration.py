"""The tables of the migration page are what their script writes."""

from importlib.metadata import version

import pytest
from support.repository import load_script, pins


def test_the_page_shows_what_the_script_writes():
    pinned = pins("tested.txt")
    if any(version(name) != pinned[name] for name in ("trl", "transformers")):
        pytest.skip("the page is of the versions in requirements/tested.txt")
    script = load_script("migration_table")
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count("| `beta` |") == 1
    assert script.updated(page) == page
