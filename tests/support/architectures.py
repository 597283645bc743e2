"""Tiny models of transformers' causal language models by class name, built from shrunken configurations."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Token ids are below; the special tokens of images and the like come behind, where no random text meets them
VOCABULARY = 97
_SPECIALS = 23

# What fields of a configuration are cut down to, by name
_SIZES = {
    name: size
    for size, names in {
        VOCABULARY + _SPECIALS: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
        64: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
        "model_max_length context_length original_max_position_embeddings mamba_d_ssm lru_width",
        48: "intermediate_size dense_intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim dim_ff dff "
        "ffn_hidden_size feed_forward_size d_ff d_inner intermediate_size_mlp mlp_dim",
        32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim attention_hidden_size cross_attention_hidden_size "
        "backbone_hidden_size hidden_size_global image_size out_hidden_size encoder_hash_byte_group_vocab",
        16: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size q_lora_rank "
        "kv_lora_rank v_head_dim qk_nope_head_dim router_hidden_size o_lora_rank hc_lowrank patch_size "
        "dim_model_base attention_head_dim prompt_mid_dim rel_extent",
        8: "head_dim global_head_dim swa_head_dim swa_v_head_dim linear_head_dim index_head_dim qk_rope_head_dim "
        "d_head dim_head kv_channels attention_head_size mamba_d_state mamba_d_head mamba_head_dim mamba_headdim "
        "state_size ssm_state_size linear_key_head_dim linear_value_head_dim d_kv "
        "hidden_size_per_layer_input laurel_rank d_rel gated_norm_rank adapter_rank pronunciation_embed_dim "
        "shape_embed_dim sliding_window sliding_window_size "
        "local_attention attention_window_size attention_chunk_size window_size query_pre_attn_scalar mamba_n_heads "
        "mamba_num_heads index_block_size keep_window_size linear_num_value_heads chunk_size mamba_chunk_size "
        "num_experts num_local_experts n_routed_experts moe_num_experts ffn_round_up_to_multiple_of block_multiple_of "
        "block_size",
        4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads index_n_heads "
        "swa_num_attention_heads index_topk rotary_dim time_step_rank mamba_dt_rank linear_num_key_heads "
        "num_query_groups zero_expert_num prompt_length centroid_intermediate_top_k local_attn_chunk_length "
        "lsh_attn_chunk_length",
        2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks num_layers_per_stack num_key_value_heads num_kv_heads kv_n_heads "
        "swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k n_group "
        "num_expert_group n_groups mamba_n_groups mamba_ngroups n_mamba_heads o_groups index_topk_blocks hc_mult "
        "hc_count hc_sinkhorn_iters moe_num_shared_experts num_global_layers num_codebooks",
        1: "topk_group first_k_dense_replace num_dense_layers",
    }.items()
    for name in names.split()
}

# Where sizes must fit each other, defaults are missing, or the default has fewer kinds of layers than the class
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    "intermediate_size": [48] * 4,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    },
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteForCausalLM": {"head_dim": 40},
    "ElectraForCausalLM": {"embedding_size": 16},
    "FlintForCausalLM": {"mlp_only_layers": [0]},
    "Gemma3nForCausalLM": _GEMMA3N,
    "GraniteMoeHybridForCausalLM": _HYBRID,
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8, "num_experts": 8, "moe_topk": 2},
    "JambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [4, 4]},
    "Lfm2ForCausalLM": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": {"moe_layers": [1, 3], "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 0]}
    | {"layer_types": ["chunked_attention", "chunked_attention", "full_attention", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MllamaForCausalLM": {"cross_attention_layers": [1]},
    "MinistralForCausalLM": {"head_dim": 8},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "Qwen4ExpForCausalLM": {
        "eos_token_id": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [3, 4]},
    "RemBertForCausalLM": {"input_embedding_size": 16, "output_embedding_size": 24},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {**_ZAMBA, "n_mamba_heads": 8},
    "ZambaForCausalLM": _ZAMBA,
}

# Models that other models run
_DRAFT = "a draft model, which reads the keys and values of another model"
_UNFIT = {"Gemma4AssistantForCausalLM": _DRAFT, "Gemma4UnifiedAssistantForCausalLM": _DRAFT}

# Tokens that every vocabulary has
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


class NotBuildable(Exception):
    """A class of which no tiny model can be made here."""


def class_names() -> list[str]:
    """Names of all classes that transformers makes causal language models of."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()})


def tiny_config(class_name: str) -> PreTrainedConfig:
    """The configuration of a tiny model: the class's own with small sizes, and one layer of each kind that it has."""
    config_class = getattr(transformers, class_name).config_class
    settings = _SETTINGS.get(class_name, {})
    broken = config_class is transformers.DbrxConfig  # as its default is; nothing is derived from these fields
    default = config_class(**settings) if broken else config_class()
    return config_class(**{**_shrunken(default), **settings})


def tiny_causal_lm(class_name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """
    A tiny model without randomness in its layers, with all parameters moved away from their symmetric values.

    Args:
        class_name (`str`): Name of a class of transformers, one of [`class_names`].

    Raises:
        NotBuildable: If it can't be built, with the reason.
    """
    if class_name in _UNFIT:
        raise NotBuildable(_UNFIT[class_name])
    torch.manual_seed(seed)
    try:
        config = tiny_config(class_name)
        config._experts_implementation = "eager"  # the others have no float64
        model = getattr(transformers, class_name)(config).to(dtype)
    except Exception as error:
        raise NotBuildable(f"{type(error).__name__}: {error}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def _shrunken(default: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration to set. Others it will find by itself."""
    known, kept = vars(default), _kept_layers(default)
    specials = iter(range(VOCABULARY, VOCABULARY + _SPECIALS))
    fields = _cut(known)
    for name, value in known.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = type(value)(**_shrunken(value))
        elif name in _TOKENS and value is not None:
            fields[name] = _TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            fields[name] = next(specials)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            fields[name] = 0.0
        elif name == "is_decoder":
            fields[name] = True
        elif _is_per_layer(default, value):
            fields[name] = [_cut({name: value[layer]}).get(name, value[layer]) for layer in kept]
    if kept:
        fields["num_hidden_layers"] = len(kept)
    if default.is_heterogeneous:
        overrides = known["_heterogeneity_spec"].per_layer_overrides
        fields["per_layer_config"] = {
            # What is larger than in other layers stays so
            i: {name: size * (2 if overrides[layer][name] > known[name] else 1) for name, size in sizes.items()}
            for i, layer in enumerate(kept)
            if (sizes := _cut(overrides.get(layer, {})))
        }
    return fields


def _cut(fields: dict[str, Any]) -> dict[str, int]:
    """Those of the fields that are sizes, and cut down."""
    sizes = {name: min(value, _SIZES[name]) for name, value in fields.items() if type(value) is int and name in _SIZES}
    heads = fields.get("num_attention_heads")
    if heads is not None and heads == fields.get("num_key_value_heads"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _is_per_layer(config: PreTrainedConfig, value: Any) -> bool:
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(value, list | tuple) or layers is None or len(value) != layers or layers < 3:
        return False
    return list(value) != list(range(layers))  # places of layers


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """The first layer of each kind, by all that the configuration lists for single layers; two of an only kind."""
    lists = [value for value in vars(config).values() if _is_per_layer(config, value)]
    first: dict[tuple, int] = {}
    for layer, kind in enumerate(zip(*lists, strict=True)):
        first.setdefault(tuple(map(str, kind)), layer)
    kept = [*first.values()]
    return [0, 1] if len(kept) == 1 else kept
