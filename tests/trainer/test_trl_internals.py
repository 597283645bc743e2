"""
Versions out of bounds are refused when the trainers are imported. What is used of TRL's insides is checked by name, so
that a version in which it has moved is refused, too. What TRL 1.15 does otherwise.
"""

import copy
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
import transformers.utils
import trl.trainer.utils
from support import oracle
from support.harness import inputs_for, make_model, make_trainer, trainer_gradients
from torch import nn
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from proma_trl.trainer import trl_internals, versions
from proma_trl.trainer.trl_internals import check_trl, recorded, replaced, rollouts_in_order

CPU = torch.device("cpu")


REQUIREMENTS = ["torch>=2", "trl<1.17,>=1.15", "peft>=0.19,<1", "accelerate>=1", 'trl[vllm]<1.16; extra == "vllm"']


def with_versions(monkeypatch, **installed):
    """What is required and installed: TRL, PEFT and accelerate."""
    installed = {"proma-trl": "7.8", "trl": "1.16.0", "peft": "0.19.0", "accelerate": "1.2", **installed}

    def version(name):
        if installed[name] is None:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "requires", {"proma-trl": REQUIREMENTS}.__getitem__)
    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize("release", ["1.15.0", "1.15.3", "1.16.0", "1.16.0+local", "1.16.1.dev0"])
def test_a_version_within_the_bounds_passes(release, monkeypatch):
    with_versions(monkeypatch, trl=release)
    versions.check_versions()


@pytest.mark.parametrize("release", ["1.14.2", "1.17.0", "1.17.0.dev0", "2.0", None])
def test_a_version_out_of_bounds_is_refused_with_the_way_out(release, monkeypatch):
    with_versions(monkeypatch, trl=release)
    what = f"trl {release} is installed" if release else "trl is not installed"
    with pytest.raises(
        ImportError, match=re.escape(f"proma-trl 7.8 works with trl>=1.15,<1.17, and {what}. ")
    ) as error:
        versions.check_versions()
    assert 'Run `pip install "trl>=1.15,<1.17"`' in str(error.value)


def test_all_versions_out_of_bounds_are_named_at_once(monkeypatch):
    with_versions(monkeypatch, trl="1.0", peft="1.0", accelerate="0.9")
    with pytest.raises(ImportError, match=r'pip install "trl>=1.15,<1.17" "peft>=0.19,<1" "accelerate>=1"'):
        versions.check_versions()


def test_a_copy_that_is_not_installed_has_no_bounds(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    with_versions(monkeypatch, trl="1.0")
    monkeypatch.setattr(versions, "requires", requires)
    versions.check_versions()


@pytest.mark.parametrize("name", ["PROMATrainer", "PROMAConfig", "DPPOTrainer", "DPPOConfig"])
def test_versions_are_checked_before_trl_is_imported(name):
    script = f"""
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "1.14.2" if name == "trl" else version(name)
try:
    from proma_trl import {name}
except ImportError as error:
    print(error)
print("trl" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "trl 1.14.2 is installed" in run.stdout and run.stdout.endswith("False\n")


def test_the_installed_version_is_known():
    check_trl(CPU)


@pytest.mark.parametrize("settings", [{}, {"intra_dim": 3}], ids=str)
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gptj"])
def test_a_head_that_is_given_scored_positions_only(architecture, settings, tmp_path, monkeypatch):
    """As that of TRL 1.15 always is: there, the model is asked for all positions instead."""
    microbatches = inputs_for(architecture, 4)
    model = make_model(architecture)
    trainer = make_trainer(tmp_path, copy.deepcopy(model), temperature=0.7, **settings)
    expected, _ = trainer_gradients(trainer, microbatches)
    monkeypatch.setattr(trl_internals, "_IS_1_15", True)
    monkeypatch.setattr(trl_internals, "_POSITIONS", SimpleNamespace(_use_triton=lambda device: True))
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    trainer = make_trainer(tmp_path, model, temperature=0.7, **settings)
    found, _ = trainer_gradients(trainer, microbatches)
    oracle.assert_close(found, expected)


def test_a_trl_with_triton_alone_is_refused_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_internals, "_IS_1_15", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a GPU, .* on 'cpu'\. .*`pip install 'trl==1\.16\.\*'`"):
        make_trainer(tmp_path)


def test_a_trl_with_triton_alone_is_refused_without_triton(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    monkeypatch.setattr(transformers.utils, "is_triton_available", lambda: False)
    spec = spec_from_file_location("proma_trl.trainer.another_copy", trl_internals.__file__)
    with pytest.raises(ImportError, match=r"TRL 1\.15\.0 .* where Triton is not installed"):
        spec.loader.exec_module(module_from_spec(spec))


@pytest.mark.parametrize("name", [*trl_internals._METHODS, *trl_internals._CLASS_ATTRIBUTES])
def test_what_is_missing_in_the_trainer_is_named(name, monkeypatch):
    monkeypatch.setattr(trl_internals, "GRPOTrainer", without(GRPOTrainer, name))
    with pytest.raises(RuntimeError, match=rf"GRPOTrainer\.{name}\b.*Install a TRL version"):
        check_trl(CPU)


def without(cls, name):
    """A stand-in for a class that has everything but one name."""

    class Meta(type):
        def __getattribute__(self, attribute):
            if attribute == name:
                raise AttributeError(attribute)
            return getattr(cls, attribute)

    return Meta(cls.__name__, (), dict(vars(cls)))


@pytest.mark.parametrize(
    "name,shown",
    [
        *((name, f"GRPOTrainer.{name}") for name in trl_internals._ATTRIBUTES),
        *((name, f"trl.trainer.grpo_trainer.{name}") for name in trl_internals._FUNCTIONS),
    ],
)
def test_what_the_trainer_no_longer_uses_is_named(name, shown, monkeypatch):
    code = {n for value in vars(GRPOTrainer).values() for n in getattr(trl_internals._code(value), "co_names", ())}
    monkeypatch.setattr(trl_internals, "_code", lambda value: SimpleNamespace(co_names=code - {name}))
    with pytest.raises(RuntimeError, match=rf"in: {re.escape(shown)}\. "):
        check_trl(CPU)


@pytest.mark.parametrize("in_order", [True, False])
def test_microbatches_of_whole_groups(in_order, tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4, order_by_length=False)
    prompts, original = [], trainer._compute_loss

    def compute_loss(model, inputs):
        prompts.append({tuple(row) for row in inputs["prompt_ids"].tolist()})
        return original(model, inputs)

    trainer._compute_loss = compute_loss
    with rollouts_in_order() if in_order else nullcontext():
        trainer.train()
    assert len(prompts) == 4 and len(set.union(*prompts)) > 1
    assert all(len(rows) == 1 for rows in prompts) is in_order


def test_a_method_with_other_arguments_is_named(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs, extra: None)
    with pytest.raises(RuntimeError, match=r"GRPOTrainer\._compute_loss"):
        check_trl(CPU)


@pytest.mark.parametrize("name", trl_internals._HEAD_NAMES)
def test_what_is_missing_of_the_fused_head_is_named(name, monkeypatch):
    monkeypatch.delattr(trl.trainer.utils, name)
    with pytest.raises(RuntimeError, match=rf"trl\.trainer\.utils\.{name}"):
        check_trl(CPU)


def test_a_fused_head_with_other_arguments_is_named(monkeypatch):
    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden: hidden))
    with pytest.raises(RuntimeError, match=r"ChunkedLogProbFunction\.forward"):
        check_trl(CPU)


@pytest.mark.parametrize("change", ["order", "transform", "dtype"])
def test_a_fused_head_that_saves_something_else_is_named(change, monkeypatch):
    state = trl_internals.kernel_state

    def other(ctx):
        found = state(ctx)
        if change == "order":
            return trl_internals.KernelState(
                found.weight, found.hidden, *(getattr(found, n) for n in ("bias", "targets", "log_z")), None, {}
            )
        if change == "transform":
            return trl_internals.KernelState(**{**vars(found), "transform": {"scale": 1.0}})
        return ctx.no_such_attribute

    monkeypatch.setattr(trl_internals, "kernel_state", other)
    with pytest.raises(RuntimeError, match="what ChunkedLogProbFunction saves"):
        check_trl(CPU)


def test_attributes_are_replaced_for_a_while():
    module = nn.Linear(1, 1)
    module.own = 1
    with replaced(module, "own", 2), replaced(module, "forward", lambda x: x + 1) as forward:
        assert module.own == 2
        assert torch.equal(module(torch.zeros(1, 1)), torch.ones(1, 1))
        assert forward.__func__ is nn.Linear.forward
    assert module.own == 1 and "forward" not in vars(module)
    with recorded(module, "forward") as calls:
        output = module(torch.ones(1, 1))
    assert calls["result"] is output and "forward" not in vars(module)
