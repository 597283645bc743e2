"""Hooks that users have on parameters' gradients act on what is emitted, as they do on an ordinary gradient."""

import pytest
import torch
from support.models import tiny_model
from support.sequences import make_batches, objectives, run

from proma_trl import PROMA, REINFORCE, ProjectedAccumulation
from proma_trl.rules.isopo import ISOPO

RULES = {
    "proma": (PROMA(), {}),
    "isopo": (ISOPO(), {}),
    "intra": (REINFORCE(), {"intra_dim": 2}),
    "both": (PROMA(), {"intra_dim": 2}),
}
NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def masked(param, how, mask):
    if how == "gradient":
        return param.register_hook(lambda grad: grad * mask)

    def multiply(param):
        param.grad.mul_(mask)

    return param.register_post_accumulate_grad_hook(multiply)


@pytest.mark.parametrize("how", ["gradient", "accumulated"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_masked_rows_are_not_trained(rule, k, when, how):
    """Whether the hook is registered before the accumulation's or after them; other rows get what is emitted."""
    model, batches = tiny_model("llama-untied", num_hidden_layers=1), make_batches("llama-untied", k)
    rule, settings = RULES[rule]
    accumulation = ProjectedAccumulation(model, rule, microbatch_size=k, **settings)
    run(accumulation, batches[:1])
    want = {name: model.get_parameter(name).grad.clone() for name in NAMES}
    model.zero_grad()
    masks = {}

    def register():
        for name in NAMES:
            param = model.get_parameter(name)
            masks[name] = torch.zeros(len(param), *[1] * (param.dim() - 1))
            masks[name][::3] = 1
            masked(param, how, masks[name])

    if when == "before":
        register()
    # Another one, as ISOPO's state and Intra-PROMA's random numbers are to be those of the first step
    accumulation = ProjectedAccumulation(model, type(rule)(), microbatch_size=k, **settings)
    for i, (ids, mask, weights, advantages) in enumerate(batches):
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        loss = accumulation.loss(objective, advantages)
        if i == 0 and when == "after":
            register()
        loss.backward()
        if i == 0:
            for name, mask in masks.items():
                torch.testing.assert_close(model.get_parameter(name).grad, want[name] * mask)
    for name, mask in masks.items():
        grad = model.get_parameter(name).grad
        assert not grad[(mask == 0).flatten()].any() and grad[(mask == 1).flatten()].any(), name


def test_the_hooks_of_others_keep_their_order_and_handles():
    model, batches = tiny_model("llama-untied", num_hidden_layers=1), make_batches("llama-untied", 4, 1)
    param, calls = model.get_parameter(NAMES[1]), []
    handles = [param.register_hook(lambda grad, i=i: calls.append(i)) for i in range(3)]
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    run(accumulation, batches)
    assert calls == [0, 1, 2]
    handles[1].remove()
    run(accumulation, batches)
    assert calls == [0, 1, 2, 0, 2]
    accumulation.detach()
    assert len(param._backward_hooks) == 2
