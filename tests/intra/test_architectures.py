"""Intra-PROMA on architectures beyond plain decoders, at any microbatch size: experts, state spaces, convolutions."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import intra, oracle
from support.models import SIZES, tiny_llava, tiny_mixture
from support.sequences import LENGTH, accumulate, make_batches, objectives
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


@pytest.mark.parametrize("counts", [(1, 1), (2, 0), (0, 2)])
def test_layers_on_images_keep_their_policy_gradient(counts):
    """However many images there are: they are not taken for sequences."""
    model = tiny_llava()
    ids = torch.randint(3, 95, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    for i, count in enumerate(counts):
        ids[i, : 4 * count] = 96
    images = torch.randn(sum(counts), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    advantages = torch.tensor([0.7, -0.3])

    def values():
        logits = model(input_ids=ids, pixel_values=images).logits[:, :-1]
        return -logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)[:, 8:].sum(1)

    (values() * advantages).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    accumulation = ProjectedAccumulation(model, REINFORCE(), microbatch_size=2, intra_dim=3)
    projected = accumulation.projected_names()
    assert projected and not any("vision" in name or "projector" in name for name in projected)
    with accumulation.capture():
        objective = values()
    accumulation.loss(objective, advantages).backward()
    for name, grad in plain.items():
        error = (model.get_parameter(name).grad - grad).norm()
        if name in projected:
            assert error > 1e-3 * grad.norm(), name
        else:
            assert error <= 1e-5 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("target_parameters", [None, ["mlp.experts.gate_up_proj"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts(family, target_parameters):
    config = LoraConfig(r=4, target_modules="all-linear", target_parameters=target_parameters, task_type="CAUSAL_LM")
    config.init_lora_weights = False
    model, batches = get_peft_model(tiny_mixture(family), config), make_batches("gemma2-softcap", 4, count=2)
    gradients, _ = accumulate(model, batches, REINFORCE(), intra_dim=2)
    accumulation = ProjectedAccumulation(model, REINFORCE(), microbatch_size=4, intra_dim=2)
    projected = accumulation.projected_names()
    accumulation.detach()
    for ids, mask, weights, advantages in batches:
        (objectives(model, ids, mask, weights) * advantages).sum().backward()
    assert projected
    for name, param in model.named_parameters():
        if param.requires_grad and param.grad is not None:
            error = (gradients[name] - param.grad).norm()
            if name in projected:
                assert error > 1e-3 * param.grad.norm(), name
            else:
                assert error <= 1e-5 * param.grad.norm() + 1e-9, name
