"""Whatever only a GPU runs, the tests run on a CPU that passes for one."""

import ast
import sys
from pathlib import Path

import coverage
import pytest
import torch
from sequence_grads import test_forms, test_rerun
from support.accelerator import accelerating
from support.harness import make_inputs, make_model, make_trainer, trainer_gradients

import proma_trl
from proma_trl import devices

PACKAGE = Path(proma_trl.__file__).parent


class Asked(set):
    """Types of devices that accelerate. Notes who asks whether one does, and is told that it does."""

    def __init__(self, types):
        super().__init__(types)
        self.places: set[tuple[str, int]] = set()

    def __contains__(self, device_type):
        found = super().__contains__(device_type)
        frame = sys._getframe(2)
        if found:
            self.places.add((frame.f_code.co_filename, frame.f_lineno))
        return found


def asks(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "accelerates"


def behind_the_seam(path: Path) -> tuple[set[int], set[int]]:
    """Lines on which a file asks whether a device accelerates, and those that run only if one does."""
    tree = ast.parse(path.read_text())
    questions = {node.lineno for node in ast.walk(tree) if asks(node)}
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and any(map(asks, ast.walk(node.test))):
            negated = isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)
            lines |= {statement.lineno for statement in (node.orelse if negated else node.body)}
        if isinstance(node, ast.Call) and any(keyword.arg == "out_dtype" for keyword in node.keywords):
            lines.add(node.lineno)
    return questions, lines


def run_all_forms():
    for make in (test_forms.outer_products, test_forms.segment_products, test_forms.dense):
        for dtype in test_forms.DTYPES:
            test_forms.test_products(make, dtype)
    test_forms.test_weighted_sum(torch.bfloat16)
    test_forms.test_experts_fill_up()
    test_forms.test_a_token_that_occurs_often_is_rounded_once()


def run_all_kinds_of_training(folder):
    cases = [
        ("qwen3-tied", {"bf16": True, "intra_dim": 3}),
        ("qwen3-tied", {"bf16": True, "projection_memory_budget": 1e-5, "intra_dim": 3, "projection": "none"}),
        ("llama-untied", {"bf16": True}),
        ("qwen3-moe", {"router_aux_loss_coef": 0.0}),
    ]
    for architecture, settings in cases:
        trainer = make_trainer(folder, make_model(architecture), **settings)
        trainer_gradients(trainer, [make_inputs(4, seed) for seed in range(2)])
    test_rerun.test_random_numbers_are_those_of_the_forward_pass()


def test_every_line_behind_the_seam_runs(tmp_path):
    measured = coverage.Coverage(data_file=None, config_file=False, include=[f"{PACKAGE}/*"])
    with accelerating(), pytest.MonkeyPatch.context() as patch:
        asked = Asked(devices.ACCELERATORS)
        patch.setattr(devices, "ACCELERATORS", asked)
        measured.start()
        try:
            run_all_forms()
            run_all_kinds_of_training(tmp_path)
        finally:
            measured.stop()
    found, unasked, missing = 0, [], []
    for path in sorted(PACKAGE.rglob("*.py")):
        questions, lines = behind_the_seam(path)
        if not questions and not lines:
            continue
        found += len(questions) + len(lines)
        _, _, _, not_run, _ = measured.analysis2(str(path))
        missing += [f"{path.relative_to(PACKAGE)}:{line}" for line in sorted(lines & set(not_run))]
        known = {line for file, line in asked.places if file == str(path)}
        unasked += [f"{path.relative_to(PACKAGE)}:{line}" for line in sorted(questions - known)]
    assert found > 20
    assert not missing, "never run as on a GPU"
    assert not unasked, "never asked for a GPU"


# Functions that are told the type of a device, and don't choose by it
TOLD = {"autocast", "get_autocast_dtype", "is_autocast_enabled"}


def questions(source: str) -> list[str]:
    """Where a text of Python reads the type of a device, other than to print it or to tell PyTorch."""
    tree = ast.parse(source)
    passed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue):
            passed.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TOLD:
            passed.update(node.args)
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node not in passed
        and ast.unparse(node) != "torch.Tensor.type"  # an operation
        and (node.attr in ("type", "is_cuda", "is_cpu", "is_mps", "is_xpu") or ast.unparse(node) == "torch.cuda")
    ]


def test_nothing_else_asks_for_the_type_of_a_device():
    """A branch for GPUs that is not behind the seam would run in no test."""
    asked = {
        str(path.relative_to(PACKAGE)): found
        for path in PACKAGE.rglob("*.py")
        if path != Path(devices.__file__) and (found := questions(path.read_text()))
    }
    assert asked == {}


@pytest.mark.parametrize(
    "source",
    [
        'device.type == "cuda"',
        'x = 1 if "cuda" != weight.device.type else 2',
        'device.type in ("cuda", "xpu")',
        "hidden.device.type not in DEVICES",
        "TABLE[device.type]",
        "TABLE.get(device.type)",
        'device.type.startswith("cu")',
        "kind = device.type",
        "match device.type:\n    case 'cuda': pass",
        "weight.is_cuda",
        "torch.cuda.synchronize()",
        'f"{1 if device.type == 1 else 2}"',
    ],
)
def test_a_question_is_found(source):
    assert len(questions(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'f"on {device.type!r}"',
        "torch.autocast(leaf.device.type, enabled=False)",
        "torch.get_autocast_dtype(device.type)",
        "accelerator.distributed_type == 1",
    ],
)
def test_what_is_no_question(source):
    assert questions(source) == []


@pytest.mark.parametrize("name,budget", [("cpu", 0.5), ("mps", 0.5), ("meta", 0.5)])
def test_the_budget_elsewhere(name, budget):
    assert devices.default_memory_budget(torch.device(name)) == budget
