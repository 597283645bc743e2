"""Architectures that the accumulation-based variant refuses train with Intra-PROMA at any microbatch size."""

import pytest
import torch
from support import intra, oracle
from support.models import SIZES
from support.sequences import accumulate, make_batches, objectives
from transformers import AutoConfig, AutoModelForCausalLM

from proma_trl import REINFORCE, ProjectedAccumulation

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
STATE_SPACE = {"state_size": 8, "time_step_rank": 4, "expand": 2}
ARCHITECTURES = {
    "mamba": STATE_SPACE,
    "falcon_mamba": STATE_SPACE,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "granitemoe": EXPERTS,
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
    | {"topk_group": 1},
}


def tiny(model_type):
    known = AutoConfig.for_model(model_type)
    own = {name: value for name, value in ARCHITECTURES[model_type].items() if hasattr(known, name)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 2, **own})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_definition_where_linear_and_the_policy_gradient_elsewhere(architecture):
    model, batches = tiny(architecture), make_batches("gemma2-softcap", 3, count=2)
    with pytest.raises(ValueError, match="PROMA needs the gradient of each sequence"):
        ProjectedAccumulation(model, microbatch_size=3)
    gradients, metrics = accumulate(model, batches, REINFORCE(), intra_dim=4)
    accumulation = ProjectedAccumulation(model, REINFORCE(), microbatch_size=3, intra_dim=4)
    projected = accumulation.projected_names()
    accumulation.detach()

    def microbatch(ids, mask, weights, advantages):
        return lambda m: objectives(m, ids, mask, weights), advantages, mask

    trained = {name: grad for name, grad in gradients.items() if grad is not None}
    want = intra.accumulate(model, [microbatch(*batch) for batch in batches], dim=4)
    oracle.assert_close(trained, {name: want[name] for name in trained})
    for ids, mask, weights, advantages in batches:
        (objectives(model, ids, mask, weights) * advantages).sum().backward()
    others = [name for name in trained if name not in projected]
    assert others and projected and metrics["intra/norm_ratio"] > 0
    for name in others:
        grad = model.get_parameter(name).grad
        assert (trained[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-9, name
