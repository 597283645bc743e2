"""A microbatch is recorded, weighed and sent backward, once and in this order. Everything else is a clear error."""

import pytest
import torch
from torch import nn

from proma_trl import ProjectedAccumulation


@pytest.fixture
def accumulation():
    torch.manual_seed(0)
    return ProjectedAccumulation(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), microbatch_size=2)


def forward(accumulation, seed=0):
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed))
    return accumulation.model(inputs).sum((1, 2))


def captured(accumulation):
    with accumulation.capture():
        return forward(accumulation)


ADVANTAGES = torch.tensor([1.0, -2.0])


def test_captures_cannot_be_nested(accumulation):
    with accumulation.capture():
        with pytest.raises(RuntimeError, match="within `capture"):
            with accumulation.capture():
                pass
        objective = forward(accumulation)
    accumulation.loss(objective, ADVANTAGES).backward()


def test_a_loss_needs_a_capture(accumulation):
    with pytest.raises(RuntimeError, match="No forward pass was captured"):
        accumulation.loss(forward(accumulation), ADVANTAGES)


def test_a_capture_without_the_model_is_none(accumulation):
    with accumulation.capture():
        pass
    with pytest.raises(RuntimeError, match="No forward pass was captured"):
        accumulation.loss(torch.ones(2), ADVANTAGES)


def test_backward_within_the_capture(accumulation):
    with accumulation.capture():
        loss = accumulation.loss(forward(accumulation), ADVANTAGES)
        with pytest.raises(RuntimeError, match="inside `with accumulation"):
            loss.backward()


def test_backward_twice(accumulation):
    loss = accumulation.loss(captured(accumulation), ADVANTAGES)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="sent backward once"):
        loss.backward()


def test_two_losses_of_one_capture(accumulation):
    objective = captured(accumulation)
    accumulation.loss(objective, ADVANTAGES).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Capture a forward pass for each loss"):
        accumulation.loss(objective, ADVANTAGES)


def test_backward_around_the_loss(accumulation):
    objective = captured(accumulation)
    with pytest.raises(RuntimeError, match=r"without `accumulation\.loss`"):
        objective.sum().backward()


def test_a_failed_backward_pass_ends_its_microbatch_and_no_other(accumulation):
    accumulation.loss(captured(accumulation), ADVANTAGES).backward()
    wanted = [param.grad.clone() for param in accumulation.model.parameters()]
    accumulation.model.zero_grad()

    objective = captured(accumulation)
    objective.register_hook(lambda grad: grad.nonexistent)
    failing = accumulation.loss(objective, ADVANTAGES)
    with pytest.raises(AttributeError):
        failing.backward()
    accumulation.model.zero_grad()

    accumulation.loss(captured(accumulation), ADVANTAGES).backward()
    for param, want in zip(accumulation.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(param.grad, want)
