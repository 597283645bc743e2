"""Where an optimizer step ends in a loop without an accelerator."""

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from proma_trl import PROMA, REINFORCE, ProjectedAccumulation
from proma_trl.rules.isopo import ISOPO

K, MICROBATCHES = 3, 3


def make(rule, optimizer_class=torch.optim.SGD, tells=False, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    given = {"optimizer": optimizer} if tells else {}
    return ProjectedAccumulation(model, rule(), microbatch_size=K, **settings, **given), optimizer


def send(accumulation, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, advantages = torch.randn(K, 5, 3, generator=generator), torch.randn(K, generator=generator)
    with accumulation.capture():
        objective = accumulation.model(inputs).sum((1, 2))
    accumulation.loss(objective, advantages).backward()


def run(accumulation, optimizer, clear, steps=3):
    """The gradients of each step, the metrics, and the state after the last microbatch of the next step."""
    gradients, seed = [], 0
    for step in range(steps + 1):
        for _ in range(MICROBATCHES):
            send(accumulation, seed)
            seed += 1
        gradients.append([param.grad.clone() for param in accumulation.model.parameters()])
        if step < steps:
            optimizer.step()
            clear(accumulation.model, optimizer)
    return gradients, accumulation.pop_metrics(), accumulation.state_dict()


CLEAR = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "zero_": lambda model, optimizer: [param.grad.zero_() for param in model.parameters()],
    "new zeros": lambda model, optimizer: [
        setattr(param, "grad", torch.zeros_like(param)) for param in model.parameters()
    ],
}
METHODS = {
    "proma": (PROMA, {}),
    "isopo": (ISOPO, {}),
    "intra": (REINFORCE, {"intra_dim": 2}),
    "accumulated": (PROMA, {"intra_dim": 2, "intra_target": "accumulated"}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("tells", [False, True])
def test_gradients_of_zero_end_a_step_as_missing_ones_do(tells, clear, method):
    rule, settings = METHODS[method]
    want = run(*make(rule, **settings), lambda model, optimizer: optimizer.zero_grad())
    found = run(*make(rule, tells=tells, **settings), CLEAR[clear])
    assert found[1] == want[1] and found[2] == want[2]
    for of_step, own in zip(found[0], want[0], strict=True):
        assert all(torch.equal(grad, other) for grad, other in zip(of_step, own, strict=True))
    if method == "isopo":
        assert found[2]["means"]
    if method == "intra":
        assert found[2]["step"] == 3


def test_a_step_without_cleared_gradients_is_refused():
    """Nothing says whether the accumulation goes on: the message says what could."""
    for update in (lambda o: o.step(), lambda o: [p.sub_(p.grad) for p in leaves(o)]):
        accumulation, optimizer = make(ISOPO)
        send(accumulation, 0)
        with torch.no_grad():
            update(optimizer)
        with pytest.raises(RuntimeError, match=r"unknown whether the step is over.*`optimizer`.*end_step"):
            send(accumulation, 1)
        accumulation.end_step()
        send(accumulation, 2)


def leaves(optimizer):
    return optimizer.param_groups[0]["params"]


def test_an_optimizer_that_is_given_tells_it():
    """Also where gradients are kept, as a momentum of one's own."""
    accumulation, optimizer = make(ISOPO, tells=True)
    for seed in range(3):
        send(accumulation, seed)
        optimizer.step()
        for param in leaves(optimizer):
            param.grad.mul_(0.9)
    assert accumulation.state_dict()["means"] and accumulation._step == 3
    optimizer.step()
    assert accumulation._step == 3  # no microbatch since


def test_one_long_accumulation_is_one_step():
    """With gradients that are clipped or added to in between, and parameters some of which are written to."""
    accumulation, _ = make(ISOPO)
    for seed in range(6):
        send(accumulation, seed)
        nn.utils.clip_grad_norm_(accumulation.model.parameters(), 1e-3)
        accumulation.model[0].weight.square().sum().backward()
        with torch.no_grad():
            accumulation.model[0].weight.mul_(1.0)
    assert accumulation._step == 0 and accumulation.state_dict() == {}


def test_gradients_from_elsewhere_are_kept():
    """Those that are there before the first microbatch are part of what is accumulated, unless they are zero."""
    accumulation, _ = make(REINFORCE, intra_dim=1)
    before = [torch.randn_like(param) for param in accumulation.model.parameters()]
    for param, grad in zip(accumulation.model.parameters(), before, strict=True):
        param.grad = grad.clone()
    send(accumulation, 0)
    other, _ = make(REINFORCE, intra_dim=1)
    send(other, 0)
    for param, grad, own in zip(accumulation.model.parameters(), before, other.model.parameters(), strict=True):
        torch.testing.assert_close(param.grad, grad + own.grad)


def test_the_optimizer_and_the_accelerator_are_not_both_needed():
    from accelerate import Accelerator

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizer` has no effect with an `accelerator`"):
        ProjectedAccumulation(model, microbatch_size=2, optimizer=optimizer, accelerator=Accelerator(cpu=True))
    with pytest.raises(TypeError, match=r"`optimizer` must be a `torch.optim.Optimizer`, got Linear"):
        ProjectedAccumulation(model, microbatch_size=2, optimizer=model)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    accumulation = ProjectedAccumulation(model, microbatch_size=2, optimizer=prepared)
    accumulation._step_began = True
    prepared.step()
    assert accumulation._step == 1


@pytest.mark.parametrize("microbatch_size", [1, K])
def test_detached_is_as_if_it_had_never_been(microbatch_size):
    accumulation, optimizer = make(PROMA, tells=True)
    accumulation.microbatch_size = microbatch_size
    send(accumulation, 0) if microbatch_size == K else None
    accumulation.detach()
    accumulation.detach()
    model = accumulation.model
    pickle.dumps((model, optimizer))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(param._backward_hooks for param in model.parameters())
    gone = weakref.ref(accumulation)
    del accumulation
    gc.collect()
    assert gone() is None


def test_a_microbatch_after_detach_is_as_any():
    accumulation, optimizer = make(ISOPO, tells=True)
    whole, other = make(ISOPO, tells=True)
    for own, opt, interrupts in ((accumulation, optimizer, True), (whole, other, False)):
        for seed in range(3):
            send(own, seed)
            opt.step()
            opt.zero_grad()
            if interrupts:
                own.detach()
    assert accumulation.state_dict() == whole.state_dict() and accumulation._step == whole._step == 3
    for param, want in zip(accumulation.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(param, want)
