"""What is used of TRL's insides is checked by name, so that a version in which it has moved is refused."""

from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from torch import nn
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from proma_trl.trainer import trl_internals
from proma_trl.trainer.trl_internals import check_trl, recorded, replaced


def test_the_installed_version_is_known():
    check_trl()


@pytest.mark.parametrize("name", [*trl_internals._METHODS, *trl_internals._CLASS_ATTRIBUTES])
def test_what_is_missing_in_the_trainer_is_named(name, monkeypatch):
    monkeypatch.setattr(trl_internals, "GRPOTrainer", without(GRPOTrainer, name))
    with pytest.raises(RuntimeError, match=rf"GRPOTrainer\.{name}\b.*Install a TRL version"):
        check_trl()


def without(cls, name):
    """A stand-in for a class that has everything but one name."""

    class Meta(type):
        def __getattribute__(self, attribute):
            if attribute == name:
                raise AttributeError(attribute)
            return getattr(cls, attribute)

    return Meta(cls.__name__, (), dict(vars(cls)))


@pytest.mark.parametrize("name", trl_internals._ATTRIBUTES)
def test_attributes_that_the_trainer_no_longer_uses_are_named(name, monkeypatch):
    code = {n for value in vars(GRPOTrainer).values() for n in getattr(trl_internals._code(value), "co_names", ())}
    monkeypatch.setattr(trl_internals, "_code", lambda value: SimpleNamespace(co_names=code - {name}))
    with pytest.raises(RuntimeError, match=rf"in: GRPOTrainer\.{name}\. "):
        check_trl()


def test_a_method_with_other_arguments_is_named(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs, extra: None)
    with pytest.raises(RuntimeError, match=r"GRPOTrainer\._compute_loss"):
        check_trl()


@pytest.mark.parametrize("name", trl_internals._HEAD_NAMES)
def test_what_is_missing_of_the_fused_head_is_named(name, monkeypatch):
    monkeypatch.delattr(trl.trainer.utils, name)
    with pytest.raises(RuntimeError, match=rf"trl\.trainer\.utils\.{name}"):
        check_trl()


def test_a_fused_head_with_other_arguments_is_named(monkeypatch):
    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden: hidden))
    with pytest.raises(RuntimeError, match=r"ChunkedLogProbFunction\.forward"):
        check_trl()


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
        check_trl()


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
