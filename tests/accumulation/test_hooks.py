"""Hooks of others on a followed layer."""

import pytest
from support import oracle
from support.models import tiny_model
from support.sequences import expected, make_batches, run

from proma_trl import ProjectedAccumulation


def scale_input(module, args):
    return (1.5 * args[0], *args[1:])


def scale_output(module, args, output):
    return 2 * output


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("when", ["between microbatches", "from the start"])
def test_hooks_that_come_later_stay_outside(place, when):
    """What a layer is given and returns is what its own forward takes and gives."""
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 3, count=2)
    layer = model.model.layers[0]
    accumulation = ProjectedAccumulation(model, microbatch_size=3)
    if when == "between microbatches":
        run(accumulation, batches)
    for module in (model.model.norm, layer.mlp.down_proj, layer.self_attn.q_proj, model.lm_head):
        if place == "before":
            module.register_forward_pre_hook(scale_input)
        else:
            module.register_forward_hook(scale_output, prepend=True)
    if place == "after":
        model.model.embed_tokens.register_forward_hook(scale_output, prepend=True)
    run(accumulation, batches)
    accumulation.detach()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    oracle.assert_close(found, expected(model, batches))
