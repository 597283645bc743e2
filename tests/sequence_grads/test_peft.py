"""PEFT's adapters of other kinds than LoRA on linear layers."""

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from support import oracle
from support.models import tiny_model
from support.sequences import accumulate, expected, make_batches

from proma_trl import PROMA, ProjectedAccumulation
from proma_trl.check import check

LAYERS = ["q_proj", "down_proj"]
KINDS = {
    "embedding": LoraConfig(target_modules=["embed_tokens", *LAYERS]),
    "DoRA": LoraConfig(target_modules=LAYERS, use_dora=True),
    "DoRA on an embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "tokens": LoraConfig(target_modules=LAYERS, trainable_token_indices=[5, 7, 11]),
    "a whole layer": LoraConfig(target_modules=LAYERS, modules_to_save=["embed_tokens"]),
    "a whole head": LoraConfig(target_modules=LAYERS, modules_to_save=["lm_head"]),
    "rsLoRA": LoraConfig(target_modules=LAYERS, use_rslora=True),
    "biases": LoraConfig(target_modules=LAYERS, bias="lora_only", lora_bias=True),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
}
TIED = {"embedding", "DoRA", "tokens", "biases"}


def adapted(kind, architecture):
    torch.manual_seed(1)
    config = KINDS[kind]
    if isinstance(config, LoraConfig):
        config.r, config.init_lora_weights = 4, "gaussian"
    model = get_peft_model(tiny_model(architecture), config)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize(
    "kind,architecture",
    [(kind, "llama-untied") for kind in KINDS] + [(kind, "qwen3-tied") for kind in KINDS if kind in TIED],
)
def test_gradients(kind, architecture, k):
    model, batches = adapted(kind, architecture), make_batches(architecture, k, count=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    for method in ("iterative", "exact"):
        found, _ = accumulate(model, batches, PROMA(method=method))
        oracle.assert_close(found, expected(model, batches, method=method))


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
# Of each sequence its own, or made once for all
PREFIXES = {
    "prefix": PrefixTuningConfig(**VIRTUAL),
    "projected prefix": PrefixTuningConfig(**VIRTUAL, prefix_projection=True, encoder_hidden_size=8),
}
PROMPTS = {
    "prompt tuning": PromptTuningConfig(**VIRTUAL),
    "P-tuning": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8),
    "P-tuning, LSTM": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    "several tasks": MultitaskPromptTuningConfig(**VIRTUAL, num_tasks=2, num_transformer_submodules=1),
}


def with_virtual_tokens(config):
    torch.manual_seed(1)
    return get_peft_model(tiny_model("llama-untied"), config)


@pytest.mark.parametrize(
    "kind,k",
    [(kind, k) for kind in PREFIXES for k in (1, 3, 8)] + [(kind, 1) for kind in PROMPTS if kind != "several tasks"],
)
def test_gradients_of_virtual_tokens(kind, k):
    model, batches = with_virtual_tokens({**PREFIXES, **PROMPTS}[kind]), make_batches("llama-untied", k, count=2)
    model.train()
    found, _ = accumulate(model, batches)
    assert any(gradient.any() for gradient in found.values())
    oracle.assert_close(found, expected(model, batches))


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_all_sequences_are_refused_at_construction(kind):
    model = with_virtual_tokens(PROMPTS[kind])
    with pytest.raises(
        ValueError,
        match=rf"(?s)`{type(PROMPTS[kind]).__name__}`\) makes virtual tokens once.*Either train with one seq",
    ):
        ProjectedAccumulation(model, microbatch_size=2)
    report = check(model, microbatch_size=2)
    assert not report.trains and "makes virtual tokens once" in str(report)
    assert check(model, microbatch_size=1).trains
    ProjectedAccumulation(model, microbatch_size=1).detach()
    # Autograd does the rest
    ProjectedAccumulation(model, PROMA(method="none"), microbatch_size=2, intra_dim=3).detach()
