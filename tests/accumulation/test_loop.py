"""The accumulation in a loop: what it follows, what it leaves alone, and what it refuses."""

import pytest
import torch
from support import oracle
from support.models import tiny_model
from support.sequences import accumulate, expected, lora, make_batch, make_batches, objectives, run
from torch import nn

from proma_trl import ProjectedAccumulation


def test_frozen_parameters_have_no_hooks():
    model = lora(tiny_model("llama-untied"))
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    hooked = {name for name, module in model.named_modules() if module._forward_hooks}
    assert hooked and all("lora_" in name for name in hooked)
    accumulation.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parameters_frozen_later_are_followed():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    model.model.layers[0].requires_grad_(False)
    run(accumulation, batches)
    oracle.assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected(model, batches))


def test_more_sequences_than_declared_are_refused():
    model = tiny_model("llama-untied")
    with pytest.raises(ValueError, match="holds 4 sequences, more than `microbatch_size=1`"):
        accumulate(model, make_batches("", 4), microbatch_size=1)


def test_a_loss_without_a_capture_is_refused():
    accumulation = ProjectedAccumulation(tiny_model("llama-untied"), microbatch_size=2)
    with pytest.raises(RuntimeError, match="No forward pass was captured"):
        accumulation.loss(torch.zeros(2), torch.zeros(2))


def test_a_backward_around_the_loss_is_refused():
    model = tiny_model("llama-untied")
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, _ = make_batch(4, 0)
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(RuntimeError, match=r"without `accumulation.loss`"):
        objective.sum().backward()


@pytest.mark.parametrize("k", [1, 4])
def test_two_losses_in_one_backward_are_refused(k):
    model = tiny_model("llama-untied")
    accumulation = ProjectedAccumulation(model, microbatch_size=k)
    losses = []
    for seed in range(2):
        ids, mask, weights, advantages = make_batch(k, seed)
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        losses.append(accumulation.loss(objective, advantages))
    with pytest.raises(RuntimeError, match="losses of two microbatches"):
        sum(losses).backward()


def test_captures_may_come_before_backwards():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    losses = []
    for ids, mask, weights, advantages in batches:
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        losses.append(accumulation.loss(objective, advantages))
    for loss in losses:
        loss.backward()
    oracle.assert_close({name: p.grad for name, p in model.named_parameters()}, expected(model, batches))


def test_ordinary_backward_passes_beside_a_captured_one():
    """With checkpointing, whose recomputation must not be taken for the captured microbatch's."""
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    want, _ = accumulate(model, batches[:1])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ordinary = objectives(model, *batches[1][:3]).sum()
    ids, mask, weights, advantages = batches[0]
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    loss = accumulation.loss(objective, advantages)
    ordinary.backward()
    model.zero_grad()
    loss.backward()
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, want[name]), name


def test_shapes_are_checked():
    model = tiny_model("llama-untied")
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, advantages = make_batch(4, 0)
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(ValueError, match="`advantages` must hold one number for each of 4 sequences"):
        accumulation.loss(objective, advantages[:3])
    with pytest.raises(ValueError, match="`objective` must have shape"):
        accumulation.loss(objective[:3], advantages)
    with pytest.raises(ValueError, match="`value` is required"):
        accumulation.loss(objective.sum(), advantages)


@pytest.mark.parametrize(
    "kwargs,name", [({"microbatch_size": 0}, "microbatch_size"), ({"memory_budget": 0}, "budget")]
)
def test_arguments_are_checked(kwargs, name):
    with pytest.raises(ValueError, match=name):
        ProjectedAccumulation(nn.Linear(2, 2), **{"microbatch_size": 1, **kwargs})


def test_a_backward_pass_that_failed_leaves_no_trace():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    want, _ = accumulate(model, batches)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, advantages = batches[0]

    def fail(grad):
        raise KeyboardInterrupt

    with accumulation.capture():
        handle = model.model.layers[0].register_full_backward_pre_hook(lambda module, grad: fail(grad))
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(KeyboardInterrupt):
        accumulation.loss(objective, advantages).backward()
    handle.remove()
    model.zero_grad()
    objectives(model, ids, mask, weights).sum().backward()
    run(accumulation, batches)
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, want[name]), name


def test_forward_passes_outside_a_capture_are_ordinary():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=2)
    model.zero_grad()
    ids, mask, weights, advantages = batches[0]
    (objectives(model, ids, mask, weights) * advantages).sum().backward()
    oracle.assert_close(
        {name: p.grad for name, p in model.named_parameters()}, expected(model, batches[:1], method="none")
    )
    accumulation.detach()
