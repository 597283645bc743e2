"""The tables of the migration page are what their script writes."""

import re
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load_script():
    spec = spec_from_file_location("migration_table", ROOT / "scripts" / "migration_table.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_the_script_writes():
    pins = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements" / "tested.txt").read_text(), re.MULTILINE))
    if any(version(name) != pins[name] for name in ("trl", "transformers")):
        pytest.skip("the page is of the versions in requirements/tested.txt")
    script = load_script()
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count("| `beta` |") == 1
    assert script.updated(page) == page
