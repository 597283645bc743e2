"""Convolutions' own rule, against autograd one sequence at a time."""

import pytest
import torch
from torch import nn

from proma_trl.sequence_grads.convolution import convolution
from proma_trl.sequence_grads.registry import rule_for

CASES = {
    "patches of an image": (nn.Conv2d(3, 5, 4, 4), (3, 8, 12)),
    "patches of other sides": (nn.Conv2d(3, 5, (2, 4), (2, 4), bias=False), (3, 6, 8)),
    "patches that leave a rest": (nn.Conv2d(3, 5, 4, 4), (3, 9, 10)),
    "patches of a video": (nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4)), (3, 2, 4, 4)),
    "overlapping": (nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), (4, 7, 6)),
    "causal, by channel": (nn.Conv1d(6, 6, 4, padding=3, groups=6), (6, 9)),
    "dilated": (nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (4, 9)),
    "circular": (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (4, 9)),
    "strided, with a rest": (nn.Conv1d(4, 4, 3, stride=2), (4, 10)),
}


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_each_sequence(case, k, rows):
    module, shape = CASES[case]
    module, lead = module.double(), (k,) if rows is None else (k, rows)
    torch.manual_seed(0)
    inputs = torch.randn(*lead, *shape, dtype=torch.float64)
    outputs = module(inputs.flatten(0, len(lead) - 1)).unflatten(0, lead)
    grad_output = torch.randn_like(outputs)
    assert rule_for(module) is convolution
    found = convolution(module, (inputs,), grad_output)
    names = [name for name, _ in module.named_parameters()]
    assert sorted(found) == sorted(names)
    for i in range(k):
        want = torch.autograd.grad(outputs[i], list(module.parameters()), grad_output[i], retain_graph=True)
        for name, grad in zip(names, want, strict=True):
            torch.testing.assert_close(found[name][i], grad, rtol=1e-10, atol=1e-10)
