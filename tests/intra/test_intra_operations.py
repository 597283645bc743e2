"""Intra-PROMA's operations: nothing that waits for a device, no long chain of them, no random numbers but its own."""

import pytest
import torch
from support.models import tiny_model
from support.sequences import make_batch, objectives
from torch.utils._python_dispatch import TorchDispatchMode

from proma_trl import PROMA, REINFORCE, ProjectedAccumulation

# Their results, or the shapes of their results, must be known on the host
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "bincount")


class Operations(TorchDispatchMode):
    """Records the operations that run, and which of them would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.waiting = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING or any(x is not None and x.dtype == torch.bool for x in indices):
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def backward(rule, **kwargs):
    """The operations of the backward pass of a second microbatch."""
    model = tiny_model("qwen3-tied")
    accumulation = ProjectedAccumulation(model, rule, microbatch_size=4, **kwargs)
    for seed in range(2):
        ids, mask, weights, advantages = make_batch(4, seed)
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        loss = accumulation.loss(objective, advantages)
        with Operations() as operations:
            loss.backward()
    return operations


@pytest.mark.parametrize("rule", [REINFORCE(), PROMA()], ids=["alone", "both"])
@pytest.mark.parametrize("target", ["microbatch", "accumulated"])
def test_the_backward_pass_does_not_wait_for_a_device(rule, target):
    assert backward(rule, intra_dim=3, intra_target=target).waiting == []


def test_the_number_of_operations():
    """About 95 for each basis, those of 15 weights' output gradients and 9 inputs. No loop over columns."""
    extra = backward(REINFORCE(), intra_dim=3).count - backward(REINFORCE(), intra_dim=0).count
    assert extra < 24 * 100
    assert backward(REINFORCE(), intra_dim=14).count == backward(REINFORCE(), intra_dim=3).count


def test_random_numbers_of_training_are_left_alone():
    model = tiny_model("qwen3-tied")
    accumulation = ProjectedAccumulation(model, REINFORCE(), microbatch_size=4, intra_dim=3)
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    ids, mask, weights, advantages = make_batch(4, 0)
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    accumulation.loss(objective, advantages).backward()
    assert torch.equal(torch.rand(3), want)
