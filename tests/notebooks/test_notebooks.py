"""
The notebooks run from top to bottom without network, and are stored with the outputs of such a run.

`python tests/notebooks/test_notebooks.py` runs them where they are and stores their outputs anew.
"""

import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NAMES = ["quickstart", "projection"]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|Users|content|var|opt|usr|private|mnt)/")


def stored(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    return "".join(
        output.text for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream"
    )


def kinds(cell):
    """What a cell has put out, without what it says."""
    return [sorted(output.get("data", [output.get("name", output.output_type)])) for output in cell.outputs]


def execute(notebook, folder):
    """Runs a notebook in a folder and puts its outputs in place of those that it had."""
    NotebookClient(
        notebook,
        timeout=500,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
    ).execute()
    notebook.metadata.language_info = {"name": "python"}


def prints(source):
    """Whether a cell prints something by itself, not only in functions that it defines."""
    statements = [node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id in {"print", "show", "train"} for call in calls)


def run(notebook, folder, tmp_path, monkeypatch):
    """Runs a notebook in a folder, where nothing can be fetched, and returns it with its outputs."""
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    for variable in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("TMPDIR", str(home / "tmp"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    # As for a reader: the notebook itself has to stay off the network.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    execute(notebook, folder)
    assert not (home / ".cache").exists()
    return notebook


@pytest.fixture
def checkout(tmp_path):
    """Copies of what a notebook finds around it."""
    for part in ("notebooks", "recipes"):
        shutil.copytree(ROOT / part, tmp_path / "checkout" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "checkout"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_stores_what_it_puts_out(name, checkout, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    notebook = run(stored(name), checkout / "notebooks", tmp_path, monkeypatch)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before
    for fresh, kept in zip(code_cells(notebook), code_cells(stored(name)), strict=True):
        assert kinds(fresh) == kinds(kept), fresh.source
        assert fresh.execution_count == kept.execution_count
    if name == "quickstart":
        accuracies = [float(percent) for percent in re.findall(r"step +\d+: accuracy ([\d.]+)%", printed(notebook))]
        first, second = accuracies[: len(accuracies) // 2], accuracies[len(accuracies) // 2 :]
        assert min(first[-1] - first[0], second[-1] - second[0]) > 10


def test_quickstart_starts_in_the_root_of_the_repository(checkout, tmp_path, monkeypatch):
    notebook = stored("quickstart")
    imports = next(i for i, cell in enumerate(notebook.cells) if "import word_problems" in cell.source)
    notebook.cells = notebook.cells[: imports + 1]
    run(notebook, checkout, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs(name):
    notebook = stored(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert any("image/png" in kind for kind in kinds(cell)) == ("plt.show()" in cell.source), cell.source
        assert (["stdout"] in kinds(cell)) == prints(cell.source), cell.source
        assert not {"stderr", "error"} & {word for kind in kinds(cell) for word in kind}, cell.source
    assert sum("plt.show()" in cell.source for cell in cells) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_is_small_and_says_nothing_of_the_machine(name):
    notebook = stored(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 400_000
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
        assert not MACHINE_PATH.search(json.dumps(cell)), cell.source


if __name__ == "__main__":
    for name in NAMES:
        notebook = stored(name)
        execute(notebook, ROOT / "notebooks")
        nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")
