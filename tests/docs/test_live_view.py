"""A run with `report_to="trackio"` leaves, without a network, what docs/live_view.md says that the dashboard shows."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image
from support.recipe import ROOT, make_settings, run_recipe, write_config

PAGE = ROOT / "docs" / "live_view.md"


def trackio(*arguments):
    command = [sys.executable, "-m", "trackio.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_run_leaves_the_metrics_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    settings = make_settings(tmp_path) | {"report_to": "trackio", "project": "my-project", "run_name": "proma"}
    run = run_recipe("--config", write_config(tmp_path, settings | {"projection": "iterative"}))
    assert run.returncode == 0, run.stderr
    # What the run recommends, and the page
    assert 'trackio show --project "my-project"' in run.stdout
    text = PAGE.read_text()
    assert "\ntrackio show --project my-project\n" in text

    listed = json.loads(trackio("list", "metrics", "--project", "my-project", "--run", "proma", "--json"))["metrics"]
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    named = {name for name in re.findall(r"`([\w/]+)`", table) if name not in re.findall(r"^\| `(.*?)`", table, re.M)}
    assert len(named) > 10 and named <= set(listed), named - set(listed)
    # Metrics of PROMA's own, none of which is missing on the page
    assert {name for name in listed if "/projection/" in name} <= named
    commands = re.findall(r"^trackio (get .*)$", text, re.MULTILINE)
    assert len(commands) == 1 and "2 value(s)" in trackio(*commands[0].split())
    assert "proma" in trackio("list", "runs", "--project", "my-project")


def test_the_picture_is_small():
    (name,) = re.findall(r"!\[.*\]\((.*)\)", PAGE.read_text())
    assert (PAGE.parent / name).stat().st_size < 200_000
    with Image.open(PAGE.parent / name) as image:
        assert image.width >= 1000
