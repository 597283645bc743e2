"""Gradients that don't come from the captured objective: refused with their true cause, or left as they are."""

import pytest
import torch
from support.models import Shared
from support.sequences import expected, make_batch, make_batches, objectives
from torch import nn

from proma_trl import PROMA, REINFORCE, ProjectedAccumulation
from proma_trl.rules.isopo import ISOPO

RULES = {
    "proma": (PROMA(), {}),
    "isopo": (ISOPO(), {}),
    "intra": (REINFORCE(), {"intra_dim": 2}),
    "both": (PROMA(), {"intra_dim": 2}),
}


class Followed(nn.Module):
    """Layers that are followed, and one that is not where single sequences don't matter."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.hidden = None

    def forward(self, inputs):
        self.hidden = self.norm(self.first(inputs))
        return self.last(torch.tanh(self.hidden)).sum((1, 2))


def make(k, rule="proma", **kwargs):
    torch.manual_seed(0)
    rule, settings = RULES[rule]
    return ProjectedAccumulation(Followed(), rule, microbatch_size=k, **settings, **kwargs)


def microbatch(k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, 5, 3, generator=generator), torch.randn(k, generator=generator)


def captured(accumulation, inputs, advantages):
    with accumulation.capture():
        objective = accumulation.model(inputs)
    return accumulation.loss(objective, advantages)


TERMS = {
    "all parameters": lambda model, inputs: 0.1 * sum(p.square().sum() for p in model.parameters()),
    "one parameter": lambda model, inputs: model.norm.weight.square().sum(),
    "another forward pass": lambda model, inputs: model(inputs).square().sum(),
    "activations of the captured one": lambda model, inputs: model.hidden.square().sum(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("term", TERMS)
def test_a_term_outside_the_objective_is_refused(term, k, rule):
    accumulation = make(k, rule)
    inputs, advantages = microbatch(k)
    loss = captured(accumulation, inputs, advantages)
    total = 2 * loss + TERMS[term](accumulation.model, inputs)
    with pytest.raises(RuntimeError, match=r"a term outside the captured objective, with a gradient for `\w+.\w+`"):
        (total / 3).backward()
    assert all(param.grad is None for param in accumulation.model.parameters())


@pytest.mark.parametrize("k", [1, 3])
def test_however_it_is_added_and_sent_backward(k):
    accumulation = make(k)
    inputs, advantages = microbatch(k)

    def term():
        return accumulation.model.last.weight.square().sum()

    def before():
        total = term()
        total = total + captured(accumulation, inputs, advantages)
        total.backward()

    def in_place():
        total = captured(accumulation, inputs, advantages)
        total += term()
        total.backward()

    def together():
        torch.stack([captured(accumulation, inputs, advantages), term()]).sum().backward()

    def two_roots():
        torch.autograd.backward([term(), captured(accumulation, inputs, advantages)])

    def under_reentrant_checkpointing():
        loss = captured(accumulation, inputs, advantages)
        again = torch.utils.checkpoint.checkpoint(
            lambda x: accumulation.model(x).sum(), inputs.clone().requires_grad_(), use_reentrant=True
        )
        (loss + again).backward()

    for attempt in (before, in_place, together, two_roots, under_reentrant_checkpointing):
        with pytest.raises(RuntimeError, match="a term outside the captured objective"):
            attempt()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 3])
def test_what_is_no_term_of_the_models_is_left_alone(k, rule):
    """Scales, one of them trained, and terms of other parameters."""
    gradients = []
    for others in (False, True):
        accumulation = make(k, rule)
        scale, offset = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.ones(2))
        for seed in range(2):
            loss = captured(accumulation, *microbatch(k, seed))
            (loss * scale + offset.square().sum() if others else 3 * loss).backward()
        gradients.append([param.grad for param in accumulation.model.parameters()])
    assert torch.equal(offset.grad, 4 * torch.ones(2)) and scale.grad != 0
    for found, want in zip(*gradients, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 3])
def test_a_term_that_is_sent_backward_by_itself_is_accumulated_as_it_is(k, rule):
    gradients = []
    for added in (False, True):
        accumulation = make(k, rule)
        for seed in range(2):
            captured(accumulation, *microbatch(k, seed)).backward()
        if added:
            TERMS["all parameters"](accumulation.model, None).backward()
        gradients.append([param.grad for param in accumulation.model.parameters()])
    for without, total, param in zip(*gradients, accumulation.model.parameters(), strict=True):
        torch.testing.assert_close(total, without + 0.2 * param.detach())


def test_the_loss_is_a_tensor_like_others():
    loss = captured(make(2), *microbatch(2))
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    assert type(loss.detach()) is torch.Tensor and type(loss.isnan()) is torch.Tensor
    assert f"{loss:.3f}" == f"{loss.item():.3f}"
    total = torch.zeros(())
    total += loss.detach()
    assert type(total) is torch.Tensor


class Borrowing(Shared):
    """Uses the weight of a layer outside it, before or after the layer itself does."""

    first = False

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        if self.first:
            hidden = nn.functional.linear(hidden, self.twice.weight)
        hidden = self.twice(hidden)
        if not self.first:
            hidden = nn.functional.linear(hidden, self.twice.weight)
        return type("Output", (), {"logits": self.head(hidden)})


@pytest.mark.parametrize("first", [False, True])
def test_a_use_outside_the_layer_is_seen_whichever_gradient_comes_first(first):
    torch.manual_seed(0)
    model = Borrowing()
    model.first = first
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, advantages = make_batch(4, 0)
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(RuntimeError, match=r"`twice.weight` is used outside the forward pass .*\(`\w+Backward0`\)"):
        accumulation.loss(objective, advantages).backward()


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, inputs):
        return torch.tanh(self.norm(self.first(inputs)))


class Nested(nn.Module):
    """A module with layers inside, and one after it."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(self.inner(inputs)).sum((1, 2))


@pytest.mark.slow
def test_a_compiled_graph_of_an_earlier_run_is_named(monkeypatch):
    """In it, hooks that were registered later don't run. With one sequence, nothing needs them."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch.manual_seed(0)
    model = Nested()
    inputs, advantages = microbatch(3)
    with torch._dynamo.config.patch(disable=False):
        model.inner.compile(backend="aot_eager")
        model(inputs).sum().backward()
        model.zero_grad()
        accumulation = ProjectedAccumulation(model, microbatch_size=3)
        with pytest.raises(RuntimeError, match=r"`inner.\w+.\w+` gets its gradient from a compiled graph.*reset"):
            captured(accumulation, inputs, advantages).backward()
    torch.compiler.reset()


def test_a_gradient_becomes_the_accumulated_one_without_a_copy():
    """What is emitted is referred to by nothing else when it arrives."""
    model, batch = Shared(), make_batches("", 4, 1)[0]
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    with accumulation.capture() as microbatch:
        objective = objectives(model, *batch[:3])
    emitted, emit = {}, microbatch._emit

    def emission(leaf, param):
        grad = emit(leaf, param)
        emitted[param] = grad.data_ptr()
        return grad

    microbatch._emit = emission
    accumulation.loss(objective, batch[3]).backward()
    assert {model.twice.weight, model.head.weight} <= emitted.keys()
    assert all(param.grad.data_ptr() == emitted[param] for param in (model.twice.weight, model.head.weight))


def test_a_sum_needs_its_weights_where_the_backward_pass_is_that_of_the_sum():
    batches = make_batches("", 4)
    torch.manual_seed(0)
    model = Shared()
    model.unused.requires_grad_(False)

    def accumulation():
        model.zero_grad()
        return ProjectedAccumulation(model, REINFORCE(), microbatch_size=4, intra_dim=2)

    def run(loss):
        own = accumulation()
        for ids, mask, weights, advantages in batches:
            with own.capture():
                objective = objectives(model, ids, mask, weights)
            loss(own, objective, advantages).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def weighted(own, objective, advantages):
        weights = own.sequence_weights(advantages)
        return own.loss((objective * weights).sum(), advantages, value=torch.zeros(()), weights=weights)

    want = run(lambda own, objective, advantages: own.loss(objective, advantages))
    found = run(weighted)
    for name, grad in want.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7)
    refused = {
        "a sum of objectives must be weighted by sequence": lambda o, x, a: o.loss(x.sum(), a, value=x.sum()),
        "`weights` must be what": lambda o, x, a: o.loss(x.sum(), a, value=x.sum(), weights=torch.ones(4)),
        "`weights` is for an `objective` that is a sum": lambda o, x, a: o.loss(x, a, weights=a),
    }
    for message, loss in refused.items():
        with pytest.raises(ValueError, match=message):
            run(loss)


@pytest.mark.parametrize("rule", RULES)
def test_a_sum_of_one_sequence_is_weighted_by_its_advantage(rule):
    gradients = []
    for is_sum in (False, True):
        accumulation = make(1, rule)
        for seed in range(2):
            inputs, advantages = microbatch(1, seed)
            with accumulation.capture():
                objective = accumulation.model(inputs)
            if is_sum:
                accumulation.loss(objective.sum(), advantages, value=torch.zeros(())).backward()
            else:
                accumulation.loss(objective, advantages).backward()
        gradients.append([param.grad for param in accumulation.model.parameters()])
    for found, want in zip(*gradients, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("rule", ["proma", "isopo", "both"])
def test_weights_other_than_one_are_refused_where_sequences_are_sent_by_themselves(rule):
    accumulation = make(3, rule)
    inputs, advantages = microbatch(3)
    with accumulation.capture():
        objective = accumulation.model(inputs)
    with pytest.raises(ValueError, match="`weights` must be what"):
        accumulation.loss((objective * advantages).sum(), advantages, value=torch.zeros(()), weights=advantages)
    weights = accumulation.sequence_weights(advantages)
    accumulation.loss((objective * weights).sum(), advantages, value=torch.zeros(()), weights=weights).backward()


def test_an_unused_layers_gradient_is_accumulated_like_others():
    """The definition holds, and hooks on the gradient act, where the loss depends on no use of a layer."""

    class Aside(Shared):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids)
            self.twice(hidden)  # leads nowhere
            return type("Output", (), {"logits": self.head(self.norm(self.twice(hidden)))})

    torch.manual_seed(0)
    model, batches = Aside(), make_batches("", 4)
    model.unused.requires_grad_(False)
    seen = []
    model.twice.weight.register_hook(lambda grad: grad if grad is None else seen.append(grad) or 2 * grad)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, advantages = batches[0]
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    accumulation.loss(objective, advantages).backward()
    want = expected(model, batches[:1])["twice.weight"]
    (grad,) = seen
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.twice.weight.grad, 2 * grad)
