"""The package as a whole: what its parts import, and which names it promises."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import proma_trl

PACKAGE = Path(proma_trl.__file__).parent
ROOT = Path(__file__).parents[1]
# From the trainer down to the mathematics: a layer may import those below it
LAYERS = [
    "tools",
    "controls",
    "trainer",
    "accumulation",
    "intra",
    "sequence_grads",
    "backends",
    "rules",
    "trust_region",
]
HELPERS = ["devices", "torch_internals", "validation"]


def imports(path):
    """Parts of the package that a file imports, whether at its top or within a function."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("proma_trl"):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    allowed = {*LAYERS[LAYERS.index(layer) + 1 :], *HELPERS}
    for path in (PACKAGE / layer).glob("*.py"):
        assert set(imports(path)) <= allowed | {layer}, path.name


def test_helpers_import_no_layer():
    for name in HELPERS:
        assert not set(imports(PACKAGE / f"{name}.py")) & set(LAYERS)


def loaded_by(statement):
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_accumulation_loads_no_trainer():
    loaded = loaded_by("from proma_trl import PROMA, Chain, ProjectedAccumulation, UpdateRule, register_rule")
    assert "torch" in loaded
    assert not {"trl", "datasets", "peft", "math_verify"} & loaded


def test_all_names_are_there():
    for name in proma_trl.__all__:
        assert getattr(proma_trl, name).__name__ in (name, "PROMA")
    assert set(proma_trl.__all__) <= set(dir(proma_trl))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        proma_trl.Nonsense  # noqa: B018


@pytest.mark.parametrize(
    "former,now,name",
    [
        ("callbacks", "tools.callbacks", "GreedyEvaluation"),
        ("config", "trainer.config", "PROMAConfig"),
        ("data", "tools.data", "load_gsm8k"),
        ("figures", "tools.figures", "draw_runs"),
        ("model_card", "trainer.model_card", "CardDataset"),
        ("policy_metrics", "tools.policy_metrics", "PolicyMetrics"),
        ("rewards", "tools.rewards", "accuracy_reward"),
        ("runs", "tools.curves", "read_curves"),
        ("sampling", "trainer.sampling", "check_server"),
        ("setup_checks", "trainer.setup_checks", "check_setup"),
    ],
)
def test_modules_have_their_former_names_too(former, now, name):
    old, new = (importlib.import_module(f"proma_trl.{module}") for module in (former, now))
    assert old is new and new.__spec__.name == f"proma_trl.{now}"
    assert hasattr(old, name)


def test_former_names_of_the_mathematics():
    import torch

    from proma_trl.projection import ProjectionSettings, project_exact, rank_tolerance, solve

    assert ProjectionSettings is proma_trl.PROMA
    sequences, acc = torch.randn(3, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    advantages = torch.zeros(3, dtype=torch.float64)
    solution = solve(
        sequences @ sequences.T,
        sequences @ acc,
        acc @ acc,
        advantages,
        ProjectionSettings("exact", bound=None),
        rank_tolerance(3, torch.float64, torch.float64),
    )
    torch.testing.assert_close(-solution.coefficients @ sequences, project_exact(acc, sequences))


def test_the_wheel_holds_every_folder():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "proma_trl").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | {"proma_trl.recipes"}
    assert set(settings["packages"]) == names
    patterns = settings["package-data"]["proma_trl.recipes"]
    packed = {path for pattern in patterns for path in (ROOT / "recipes").glob(pattern)}
    assert packed == set((ROOT / "recipes").rglob("*.yaml"))


def test_one_version():
    assert metadata.version("proma-trl") == proma_trl.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == proma_trl.__version__
    versions = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == proma_trl.__version__


def test_citations_agree():
    """CITATION.cff, the README and the model card cite the same paper."""
    from proma_trl import PROMATrainer

    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    title, number = paper["title"], paper["url"].rpartition("/")[2]
    for text in ((ROOT / "README.md").read_text(), PROMATrainer._paper["citation"]):
        assert title in text and number in text
