"""The results of the version matrix cover the bounds of pyproject.toml, and the page shows them."""

from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.repository import ROOT, load_script, pins

MATRIX = load_script("test_matrix")
BOUNDS = MATRIX.bounds()
RESULTS = MATRIX.read_results()


def edges(name):
    """The lower bound, and the upper one, if there is one."""
    limits = {specifier.operator: Version(specifier.version) for specifier in BOUNDS[name].specifier}
    return limits[">="], limits.get("<")


def test_the_page_shows_the_results():
    page = MATRIX.PAGE.read_text(encoding="utf-8")
    assert page.count(MATRIX.START) == page.count(MATRIX.END) == 1
    assert MATRIX.updated(page, RESULTS) == page


def test_a_changed_result_is_seen():
    page = MATRIX.PAGE.read_text(encoding="utf-8")
    changed = [{**RESULTS[0], "passed": RESULTS[0]["passed"] + 1}, *RESULTS[1:]]
    assert MATRIX.updated(page, changed) != page


@pytest.mark.parametrize("name", MATRIX.PACKAGES)
def test_both_ends_of_the_range_were_tested(name):
    tested = [Version(result["packages"][name]) for result in RESULTS if result["ok"]]
    low, high = edges(name)
    assert low in {Version(version.public) for version in tested}
    if high is not None:
        *major, last = max(tested).release[: len(high.release)]
        assert Version(".".join(map(str, (*major, last + 1)))) >= high, f"{name} up to {high} was not tested"


def test_everything_within_the_bounds_passed():
    within = [r for r in RESULTS if all(BOUNDS[n].specifier.contains(v) for n, v in r["packages"].items())]
    assert {result["ok"] for result in within} == {True}


def test_pin_sets_are_within_the_bounds_and_the_oldest_is_their_lower_end():
    oldest, tested = pins("tested_oldest.txt"), pins("tested.txt")
    for name in MATRIX.EXTENDED:
        assert Version(oldest[name]) == edges(name)[0]
        assert BOUNDS[name].specifier.contains(tested[name])


def test_the_installed_bounds_are_those_of_the_project():
    installed = [Requirement(text) for text in requires("proma-trl")]
    assert {r.name: r.specifier for r in installed if r.marker is None} == {
        name: requirement.specifier for name, requirement in BOUNDS.items()
    }, "pyproject.toml has changed since the project was installed: `make install`"


def test_the_newest_versions_are_taken_without_upper_bounds(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(MATRIX.without_upper_bounds(text))
    lifted = MATRIX.bounds(tmp_path)
    for name, requirement in BOUNDS.items():
        kept = {s for s in requirement.specifier if s.operator != "<" or name not in MATRIX.EXTENDED}
        assert set(lifted[name].specifier) == kept
    assert 'trl[vllm]>=1.15"' in (tmp_path / "pyproject.toml").read_text()


def test_releases_within_the_bounds_are_chosen_oldest_first(monkeypatch):
    printed = "trl (1.17.0)\nAvailable versions: 1.17.0, 1.16.0, 1.16.0rc1, 1.15.0, 1.14.2\n"
    monkeypatch.setattr(MATRIX.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"stdout": printed}))
    assert MATRIX.releases() == ["1.15.0", "1.16.0"]
    with pytest.raises(SystemExit, match=r"bounds: 1\.14\.2\. There are 1\.15\.0, 1\.16\.0"):
        MATRIX.run_releases(["1.14.2"], resume=False)


def test_a_release_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(MATRIX, "releases", lambda: ["1.15.0", "1.15.1", "1.16.0"])
    monkeypatch.setattr(MATRIX, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(MATRIX, "PAGE", tmp_path / "page.md")
    MATRIX.PAGE.write_text(f"Before\n{MATRIX.START}\n{MATRIX.END}\nafter\n")

    def make(release):
        if release == "1.15.1":
            raise MATRIX.subprocess.CalledProcessError(1, "install")
        return release

    def tested(release):
        packages = {**RESULTS[0]["packages"], "trl": release}
        return {**RESULTS[0], "packages": packages, "ok": release != "1.15.0", "failed": int(release == "1.15.0")}

    monkeypatch.setattr(MATRIX, "make_release", make)
    monkeypatch.setattr(MATRIX, "test", tested)
    assert not MATRIX.run_releases([], resume=False)
    assert [result["packages"]["trl"] for result in MATRIX.read_results()] == ["1.15.0", "1.16.0"]
    assert "1 failed" in MATRIX.PAGE.read_text() and MATRIX.PAGE.read_text().endswith("\nafter\n")
    # Once more with one of them: in the place of the former result
    assert MATRIX.run_releases(["1.16.0"], resume=False) and len(MATRIX.read_results()) == 2
