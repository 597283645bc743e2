"""Tiny vision-language models, and microbatches whose sequences hold different numbers of images."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from support import oracle
from support.models import SIZES

PLACEHOLDER, LENGTH, PROMPT = 90, 24, 18
TEXT = {**SIZES, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8}
LINEAR_ATTENTION |= {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
POSITIONS = {"intermediate_size": 48, "num_position_embeddings": 16}
PATCHES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32, "in_channels": 3}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 16, "patch_size": 4}

# Images of one size: the features of each, and the model
IMAGES = {
    "llava": (
        4,
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_feature_select_strategy": "default"}
        | {"vision_config": {**TOWER, "image_size": 8, "model_type": "clip_vision_model"}},
    ),
    "gemma3": (
        4,
        {"text_config": {**TEXT, "sliding_window": 32, "query_pre_attn_scalar": 8}, "mm_tokens_per_image": 4}
        | {"vision_config": {**TOWER, "model_type": "siglip_vision_model"}},
    ),
    "idefics3": (4, {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER, "scale_factor": 2}),
    "smolvlm": (4, {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER, "scale_factor": 2}),
    "paligemma": (
        4,
        {"text_config": {**TEXT, "model_type": "gemma"}, "projection_dim": 32, "hidden_size": 32}
        | {"vision_config": {**TOWER, "image_size": 8, "model_type": "siglip_vision_model", "projection_dim": 32}},
    ),
    "idefics2": (
        2,
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER}
        | {
            "perceiver_config": {
                "resampler_n_latents": 2,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "num_key_value_heads": 1,
                "resampler_head_dim": 16,
            }
        },
    ),
    "vipllava": (
        4,
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_feature_layers": [-2, -1]}
        | {"vision_config": {**TOWER, "image_size": 8, "model_type": "clip_vision_model"}},
    ),
    "cohere2_vision": (
        4,
        {"text_config": {**TEXT, "model_type": "cohere2"}, "downsample_factor": 2, "alignment_intermediate_size": 32}
        | {"vision_config": {**TOWER, "model_type": "siglip_vision_model"}},
    ),
    "internvl": (
        4,
        {"text_config": {**TEXT, "model_type": "qwen2"}, "image_seq_length": 4, "downsample_ratio": 0.5}
        | {"vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}},
    ),
    "aya_vision": (
        4,
        {"text_config": {**TEXT, "model_type": "cohere2"}, "downsample_factor": 2, "alignment_intermediate_size": 32}
        | {"vision_config": {**TOWER, "model_type": "siglip_vision_model"}},
    ),
}
# Images of two sizes, as rows of patches
GRIDS = ((1, 2, 4), (1, 4, 4))
ROWS = {
    "qwen2_vl": {"vision_config": {**PATCHES, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}},
    "qwen2_5_vl": {
        "vision_config": {**PATCHES, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
    },
    "qwen3_vl": {"vision_config": {**PATCHES, **POSITIONS, "deepstack_visual_indexes": [0]}},
    "qwen3_vl_moe": {
        "text_config": EXPERTS,
        "vision_config": {**PATCHES, **POSITIONS, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {
        "text_config": LINEAR_ATTENTION,
        "vision_config": {**PATCHES, **POSITIONS},
    },
    "qwen3_5_moe": {
        "text_config": {**EXPERTS, **LINEAR_ATTENTION},
        "vision_config": {**PATCHES, **POSITIONS},
    },
}
FAMILIES = (*IMAGES, *ROWS, "mistral3")
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
PIXTRAL |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
PADDED = {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": PIXTRAL}
# Families whose images can't be told apart, and one of those above with another's tower
OTHERS = {
    "llava_next": {**IMAGES["llava"][1], "image_grid_pinpoints": [[8, 16]]},
    "glm4v": {"vision_config": {**PATCHES, "intermediate_size": 48, "image_size": 16}},
    "llava": {**PADDED, "vision_feature_layer": -1},
}
COUNTS = {1: (2,), 2: (2, 0), 3: (2, 0, 1), 8: (0, 1, 2, 0, 1, 1, 2, 0)}


def settings_of(family: str) -> dict:
    """What the configuration of a family's tiny model differs in."""
    if family == "mistral3":
        return {**PADDED, "spatial_merge_size": 2, "vision_feature_layer": -1}
    return dict(IMAGES[family][1] if family in IMAGES else ROWS[family])


def tiny_vlm(
    family: str, own: dict | None = None, seed: int = 0, token: int = PLACEHOLDER, attention="eager"
) -> torch.nn.Module:
    """A model of a family, without dropout, all parameters moved away from their symmetric values."""
    own = settings_of(family) if own is None else dict(own)
    known = AutoConfig.for_model(family)
    if family in (*ROWS, "glm4v"):
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        own["text_config"] = {**TEXT, "rope_parameters": rope, **own.get("text_config", {})}
    key = "image_token_index" if "image_token_index" in type(known).attribute_map.values() else "image_token_id"
    extra = {name: 96 - i for i, name in enumerate(("video_token_id", "vision_start_token_id", "vision_end_token_id"))}
    config = AutoConfig.for_model(family, **own, **{key: token}, **(extra if family in (*ROWS, "glm4v") else {}))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    if "moe" in family:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


class VisionBatch:
    """
    A microbatch.

    Args:
        model: The model.
        counts: Number of images of each sequence.
        seed: Where its random numbers start.
    """

    def __init__(self, model, counts, seed=0):
        self.family = model.config.model_type
        generator = torch.Generator().manual_seed(seed)
        k = len(counts)
        self.counts = counts
        self.ids = torch.randint(3, 80, (k, LENGTH), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[:, LENGTH - 1] = torch.arange(k) % 2
        self.grids = [[GRIDS[(seed + i + j) % 2] for j in range(n)] for i, n in enumerate(counts)]
        self.pixels = []
        for i, grids in enumerate(self.grids):
            place, own = 1, []
            for _, height, width in grids:
                features = IMAGES[self.family][0] if self.family in IMAGES else height * width // 4
                self.ids[i, place : place + features] = PLACEHOLDER
                place += features + 1
                own.append(self._image(model.config, height * width, generator))
            assert place <= PROMPT
            self.pixels.append(own)
        self.weights = torch.rand((k, LENGTH - 1), generator=generator) * self.mask[:, 1:]
        self.weights[:, : PROMPT - 1] = 0
        self.advantages = torch.randn(k, generator=generator)

    def _image(self, config, patches, generator):
        if self.family not in ROWS:
            size = config.vision_config.image_size
            size = size[0] if isinstance(size, (list, tuple)) else size
            return torch.randn((3, size, size), generator=generator)
        vision = config.vision_config
        return torch.randn((patches, 3 * vision.temporal_patch_size * vision.patch_size**2), generator=generator)

    def inputs(self, sequences, dtype):
        """What the model is called with, for some of the sequences."""
        found = {"input_ids": self.ids[sequences], "attention_mask": self.mask[sequences]}
        images = [image.to(dtype) for i in sequences for image in self.pixels[i]]
        if self.family == "gemma3":
            found["token_type_ids"] = (found["input_ids"] == PLACEHOLDER).long()
        if self.family in ROWS:
            found["mm_token_type_ids"] = (found["input_ids"] == PLACEHOLDER).int()
        if not images:
            return found
        if self.family in ROWS:
            found["pixel_values"] = torch.cat(images)
            found["image_grid_thw"] = torch.tensor([grid for i in sequences for grid in self.grids[i]])
        elif self.family in ("idefics2", "idefics3", "smolvlm"):  # an entry a sequence, filled up with empty images
            most = max(len(self.pixels[i]) for i in sequences)
            empty = torch.zeros_like(images[0])
            rows = [[x.to(dtype) for x in self.pixels[i]] for i in sequences]
            found["pixel_values"] = torch.stack([torch.stack(row + [empty] * (most - len(row))) for row in rows])
        else:
            found["pixel_values"] = torch.stack(images)
        if self.family == "mistral3":
            found["image_sizes"] = torch.tensor([(4 * h, 4 * w) for i in sequences for _, h, w in self.grids[i]])
        return found

    def objectives(self, model, sequences=None):
        """`-sum_t w_t log p(y_t)` of some of the sequences."""
        sequences = list(range(len(self.ids))) if sequences is None else sequences
        dtype = next(model.parameters()).dtype
        logits = model(**self.inputs(sequences, dtype)).logits[:, :-1]
        ids = self.ids[sequences]
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return -(log_probs * self.weights[sequences]).sum(-1) / LENGTH


def expected(model, batches, **settings):
    """The definition's gradients."""

    def one(batch, i):
        return lambda m: batch.objectives(m, [i])[0]

    microbatches = [([one(batch, i) for i in range(len(batch.ids))], batch.advantages) for batch in batches]
    return oracle.accumulate(model, microbatches, **settings)


def run(accumulation, batches):
    """Accumulates microbatches in the model's gradients, and returns these."""
    model = accumulation.model
    for batch in batches:
        with accumulation.capture():
            objective = batch.objectives(model)
        accumulation.loss(objective, batch.advantages).backward()
    accumulation.detach()
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    gradients = {name: torch.zeros_like(param) if param.grad is None else param.grad for name, param in trained}
    model.zero_grad()
    return gradients
