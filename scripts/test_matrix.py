"""
Runs the core tests with other versions of the packages, and keeps what came of it.

    python scripts/test_matrix.py releases [--releases 1.15.0 ...] [--resume]   TRL's releases within the bounds
    python scripts/test_matrix.py newest                                        the newest packages, bounds or not
    python scripts/test_matrix.py environment FOLDER                            an environment that is there

Environments are made in `.venv-matrix`, and those of releases used again while their pins are the same. `releases` and
`environment` write results/compatibility.json and the table of docs/compatibility.md. All releases are tested,
whatever comes of one; the exit status is 1 if a test failed or an environment could not be made.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-matrix"
RESULTS = ROOT / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
PINS = ROOT / "requirements" / "tested.txt"
CORE = ROOT / "tests" / "core.txt"
# What a result names
PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft", "datasets")
# What `newest` takes from the registry whatever the bounds
EXTENDED = ("trl", "transformers", "accelerate", "peft", "datasets")
# Before, TRL has its fused head in Triton alone
HEAD_IN_TORCH = Version("1.16")
START, END = "<!-- compatibility: written by scripts/test_matrix.py -->", "<!-- end of compatibility -->"


def bounds(root: Path = ROOT) -> dict[str, Requirement]:
    """The direct dependencies by name, as pyproject.toml bounds them."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}


def releases() -> list[str]:
    """TRL's releases on the registry within the bounds, oldest first."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", "trl"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^Available versions: (.*)$", printed, re.MULTILINE).group(1).split(", ")
    return sorted(bounds()["trl"].specifier.filter(found), key=Version)


def make_release(release: str) -> Path:
    """An environment with the tested pin set and one release of TRL. Returns its folder."""
    pins = re.sub(r"^trl==.*$", f"trl=={release}", PINS.read_text(), flags=re.MULTILINE)
    if Version(release) < HEAD_IN_TORCH:
        pins += (ROOT / "requirements" / "tested_triton.txt").read_text()
    folder = ENVIRONMENTS / release
    kept = folder / "pins.txt"
    if not kept.is_file() or kept.read_text() != pins:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(pins)
            file.flush()
            subprocess.run(["bash", "scripts/install.sh", str(folder), file.name], cwd=ROOT, check=True)
        kept.write_text(pins)
    return folder


def make_newest(copy: Path) -> Path:
    """
    An environment with the newest packages. The project is a copy without upper bounds on what it extends, so that the
    registry's newest are taken, and so that the package itself needs no switch for it.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    project = copy / "pyproject.toml"
    project.write_text(without_upper_bounds(project.read_text()))
    folder = ENVIRONMENTS / "newest"
    shutil.rmtree(folder, ignore_errors=True)
    setup = f'venv="{folder}"; source scripts/environment.sh; make_environment; install_torch; pip install -e ".[dev]"'
    subprocess.run(["bash", "-euo", "pipefail", "-c", setup], cwd=copy, check=True)
    return folder


def without_upper_bounds(project: str) -> str:
    """The text of pyproject.toml, with lower bounds alone for what the package extends."""
    return re.sub(rf'("(?:{"|".join(EXTENDED)})(?:\[\w+\])?>=[^,"]+),<[^"]+"', r'\1"', project)


def test(environment: Path, root: Path = ROOT) -> dict:
    """Runs the core tests of a checkout in an environment. Returns what the results say of it."""
    python = environment / "bin" / "python"
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [str(python), "-m", "pytest", f"@{CORE.relative_to(ROOT)}", f"--junit-xml={report.name}"]
        status = subprocess.run(command, cwd=root).returncode
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if Path(report.name).stat().st_size:
            for suite in ElementTree.parse(report.name).getroot().iter("testsuite"):
                counts = {name: count + int(suite.get(name)) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    return {
        **installed(python),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "passed": counts["tests"] - failed - counts["skipped"],
        "skipped": counts["skipped"],
        "failed": failed,
        "ok": status == 0,
    }


def installed(python: Path) -> dict:
    """The versions that an environment has."""
    code = "import json, platform, sys; from importlib.metadata import version as v; " + (
        "print(json.dumps({'python': platform.python_version(), 'packages': {n: v(n) for n in sys.argv[1:]}}))"
    )
    return json.loads(subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, check=True).stdout)


def keep(result: dict) -> None:
    """Writes a result in the place of the one with the same versions, and the table."""
    results = read_results()
    kept = [other for other in results if any(other[key] != result[key] for key in ("packages", "python"))]
    results = sorted([*kept, result], key=lambda r: [Version(r["packages"][name]) for name in PACKAGES])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(updated(PAGE.read_text(), results))


def read_results() -> list[dict]:
    """What has been tested, by version of TRL."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def updated(page: str, results: list[dict]) -> str:
    """The page with the table of these results."""
    before, _, rest = page.partition(START)
    allowed = ", ".join(f"`{name}{readable(bounds()[name])}`" for name in PACKAGES)
    return f"{before}{START}\n\nIn the range: {allowed}.\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}"


def readable(requirement: Requirement) -> str:
    """Its bounds, the lower one first."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def table(results: list[dict]) -> str:
    """Results as a table in Markdown, newest versions first."""
    rows = [f"| {' | '.join((*PACKAGES, 'Python', 'Tests', 'Date'))} |", f"|{' --- |' * (len(PACKAGES) + 3)}"]
    for result in reversed(results):
        tests = f"{result['passed']} passed" + (f", {result['failed']} failed" if result["failed"] else "")
        tests += "" if result["ok"] or result["failed"] else ", then an error"
        versions = [result["packages"][name] for name in PACKAGES]
        rows.append(f"| {' | '.join((*versions, result['python'], tests, result['date']))} |")
    return "\n".join(rows)


def passed_today(release: str) -> bool:
    """Whether a release is in the results of today, with everything passed and the other packages as pinned."""
    pins = dict(re.findall(r"^(\S+?)==(\S+)", PINS.read_text(), re.MULTILINE)) | {"trl": release}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return any(
        result["ok"] and result["date"] == today
        and all(result["packages"][name] == pins[name] for name in PACKAGES if name in pins)
        for result in read_results()
    )  # fmt: skip


def run_releases(chosen: list[str], resume: bool) -> bool:
    """Tests releases of TRL one after another. Returns whether all passed."""
    known = releases()
    if unknown := sorted({*chosen} - {*known}):
        sys.exit(f"No TRL release within pyproject's bounds: {', '.join(unknown)}. There are {', '.join(known)}.")
    failed = []
    for release in chosen or known:
        if resume and passed_today(release):
            print(f"TRL {release} has passed today", flush=True)
            continue
        print(f"TRL {release}", flush=True)
        try:
            result = test(make_release(release))
        except subprocess.CalledProcessError as error:
            print(f"No environment for TRL {release}: {error}", file=sys.stderr)
            failed.append(release)
            continue
        keep(result)
        if not result["ok"]:
            failed.append(release)
    if failed:
        print(f"Failed: TRL {', '.join(failed)}", file=sys.stderr)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("releases")
    command.add_argument("--releases", nargs="+", default=[], help="these alone")
    command.add_argument(
        "--resume", action="store_true", help="leave out what has passed today with the same packages"
    )
    commands.add_parser("newest")
    command = commands.add_parser("environment")
    command.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "releases":
        sys.exit(not run_releases(args.releases, args.resume))
    if args.command == "newest":
        with tempfile.TemporaryDirectory() as copy:
            result = test(make_newest(Path(copy)), Path(copy))
        print(table([result]))
    else:
        result = test(args.folder.absolute())
        keep(result)
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
