"""
The notebooks run from top to bottom without network and without a checkout, and are stored with the outputs of such a
run.

`python tests/notebooks/test_notebooks.py [NAME ...]` runs them and stores their outputs anew.
"""

import ast
import json
import os
import re
import shlex
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
NAMES = ["quickstart", "projection", "rules"]
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
    client = NotebookClient(
        notebook,
        timeout=500,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
    )
    # DeepSpeed, which notebooks do not ask for, would say in their output which device it has found
    client.execute(env=os.environ | {"DS_ACCELERATOR": "cpu"})
    notebook.metadata.language_info = {"name": "python"}


def python(source):
    """A cell with IPython's magics as the calls that they are."""
    return TransformerManager().transform_cell(source)


def prints(source):
    """Whether a cell prints something by itself, not only in functions that it defines."""
    nodes = ast.parse(python(source)).body
    statements = [node for node in nodes if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_stores_what_it_puts_out(name, tmp_path, monkeypatch):
    """In an empty folder, which it leaves empty."""
    (tmp_path / "empty").mkdir()
    notebook = run(stored(name), tmp_path / "empty", tmp_path, monkeypatch)
    assert not [*(tmp_path / "empty").iterdir()]
    for fresh, kept in zip(code_cells(notebook), code_cells(stored(name)), strict=True):
        assert kinds(fresh) == kinds(kept), fresh.source
        assert fresh.execution_count == kept.execution_count
    if name == "quickstart":
        accuracies = [float(percent) for percent in re.findall(r"step +\d+: accuracy ([\d.]+)%", printed(notebook))]
        first, second = accuracies[: len(accuracies) // 2], accuracies[len(accuracies) // 2 :]
        assert min(first[-1] - first[0], second[-1] - second[0]) > 10


@pytest.mark.parametrize("name", NAMES)
def test_installs_what_it_imports(name, monkeypatch):
    """The first cell asks pip for the package where that is missing. Its dependencies have all else."""
    asked, modules = [], set()
    first, *others = [python(cell.source) for cell in code_cells(stored(name))]
    shell = SimpleNamespace(run_line_magic=lambda *arguments: asked.append(arguments))
    for found in (object(), None):
        monkeypatch.setattr("importlib.util.find_spec", lambda module, found=found: found)
        exec(first, {"get_ipython": lambda: shell})
    ((magic, line),) = asked
    command, *_, requested = shlex.split(line)
    assert (magic, command) == ("pip", "install")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requested = Requirement(requested)
    assert requested.name == project["name"]
    extras = [project["optional-dependencies"][extra] for extra in requested.extras]
    installed = {Requirement(text).name for text in sum(extras, project["dependencies"])}
    for node in ast.walk(ast.parse("\n".join(others))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    needed = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert "proma_trl" in needed and needed - {"proma_trl"} <= installed


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
    for name in sys.argv[1:] or NAMES:
        notebook = stored(name)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")
