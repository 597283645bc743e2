"""Tiny models of many architectures, built in code with random weights that make no parameter's gradient trivial."""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES = {
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2-biases": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma2-softcap": {"model_type": "gemma2", "sliding_window": 32, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 32, "query_pre_attn_scalar": 8},
    "cohere": {"model_type": "cohere", "use_qk_norm": True},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-projected": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16},
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", "tie_word_embeddings": False},
    "granite": {"model_type": "granite", "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "falcon": {"model_type": "falcon", "new_decoder_architecture": False, "alibi": False, "bias": True},
    "nemotron": {"model_type": "nemotron"},
    "stablelm": {"model_type": "stablelm", "qk_layernorm": True},
    "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "glm4": {"model_type": "glm4"},
    "smollm3": {"model_type": "smollm3"},
}

# Mixtures, and modules without a rule: attention with sinks, a mixer that uses its convolution's parameters itself
WITHOUT_RULES = {
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"router_aux_loss_coef": 0.0},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.0,
    },
    "falcon-h1": {"model_type": "falcon_h1", "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    | {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4},
}


def tiny_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs) -> torch.nn.Module:
    """A tiny causal language model without dropout, with all parameters moved away from their symmetric values."""
    settings = {**SIZES, **(ARCHITECTURES | WITHOUT_RULES)[architecture], **kwargs}
    model_type = settings.pop("model_type")
    if model_type == "falcon":
        del settings["head_dim"]
    config = AutoConfig.for_model(model_type, **settings)
    for name in list(vars(config)):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if architecture in ("qwen3-moe", "gpt-oss"):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def tiny_llava() -> torch.nn.Module:
    """A LLaVA-style model: an image takes four of a sequence's tokens, those with id 96."""
    text = LlamaConfig(**{**SIZES, "num_key_value_heads": 4})
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=96, vision_feature_select_strategy="default"
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def tiny_mixture(model_type: str) -> torch.nn.Module:
    """A model with experts: `"qwen3_moe"` or `"gpt_oss"`."""
    sizes = {**SIZES, "num_hidden_layers": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    experts = {"num_local_experts": 4} if model_type == "gpt_oss" else {"num_experts": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **experts))


class Shared(nn.Module):
    """A linear layer that runs twice, and one that never does."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(SIZES["vocab_size"], 16)
        self.twice = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, SIZES["vocab_size"], bias=False)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        update = self.twice(torch.tanh(self.twice(hidden)))
        update += hidden  # models do write to a layer's output in place
        return type("Output", (), {"logits": self.head(self.norm(update).cumsum(1))})
