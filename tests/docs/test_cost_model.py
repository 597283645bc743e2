"""The tables of the cost model are what its script prints."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def output(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "cost_model.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_documentation_shows_what_it_prints():
    text = (ROOT / "docs" / "distributed.md").read_text()
    (shown,) = re.findall(r"<!-- cost model: .* -->\n(.*)\n<!-- end of cost model -->", text, re.DOTALL)
    assert shown == output()


def test_options():
    lines = output("--gpus", "8", "--sequences", "8", "--tokens", "512").splitlines()
    assert sum(line.startswith("| 8 |") for line in lines) == 3
    assert "a microbatch of 8 x 512 tokens" in lines[0]
