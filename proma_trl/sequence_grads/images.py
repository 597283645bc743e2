"""
Which rows of a vision tower's tensors belong to which sequence.

A multimodal model writes the features of its images, in order, over placeholder tokens. So a sequence's share of all
features is its share of all placeholders. Towers and projectors of the families below keep the order, and each of
their tensors has a fixed number of rows to a feature (patches, which are merged later) or of features to a row (images
or tiles of one size). So a sequence's share of the rows is the same.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .layer import ONE_SEQUENCE, Sink, base_model

# Families whose images have one size, so that each has as many features
_IMAGES = (
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "idefics2",
    "idefics3",
    "internvl",
    "llava",
    "paligemma",
    "smolvlm",
    "vipllava",
)
# Families whose tensors have a row for each patch, or group of patches
_PATCHES = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
# Towers that take images of different sizes, padded, before they have a row for each patch
_PADS_IMAGES = ("pixtral",)

_UNKNOWN = "runs outside the text decoder, so that it isn't known which sequence an image (or its patch) belongs to"
_ENCODER = "runs in the encoder of an encoder-decoder model, of which the decoder alone is followed"


class ImageRows:
    """
    How the rows of tensors are spread over the sequences of a microbatch.

    Args:
        features (`Sequence[int]`): Number of placeholder tokens of each of k sequences, on the CPU.
    """

    def __init__(self, features: Sequence[int]):
        self.features = tuple(features)

    def has(self, i: int) -> bool:
        """Whether sequence i has any rows."""
        return self.features[i] > 0

    def counts(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """Rows of each sequence in the leading dimension of a tensor; `None` if that does not have one a feature."""
        total, rows = sum(self.features), tensor.shape[0] if tensor.dim() else 0
        if not total or not rows or (rows % total and total % rows) or any(n * rows % total for n in self.features):
            return None
        return tuple(n * rows // total for n in self.features)

    def tells(self, tensor: torch.Tensor) -> bool:
        """Whether `by_sequence` can tell the rows of a tensor apart."""
        return self._rows(tensor)[1] is not None

    def by_sequence(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """
        View a tensor `(rows, ...)`, or `(1, rows, ...)`, as `(k, R, ...)`, filled up with zeros.

        Raises:
            ValueError: If the rows can't be told apart.
        """
        rows, counts = self._rows(tensor)
        if counts is None:
            raise ValueError(
                f"`{name}` ran on a tensor of shape {tuple(tensor.shape)}, the rows of which are not spread over the "
                f"sequences as their {sum(self.features)} image tokens are. Train with {ONE_SEQUENCE}, or freeze its "
                "parameters."
            )
        k, longest = len(counts), max(counts)
        if min(counts) == longest:
            return rows.reshape(k, longest, *rows.shape[1:])
        places = _places(counts, rows.device)
        filled = rows.new_zeros((k * longest, *rows.shape[1:])).index_copy(0, places, rows)
        return filled.view(k, longest, *rows.shape[1:])

    def together(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The opposite of `by_sequence`, in the shape of `like`."""
        _, counts = self._rows(like)
        return tensor.flatten(0, 1)[_places(counts, tensor.device)].view(like.shape)

    def _rows(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
        """A tensor without a leading dimension of one before that of the rows, and the number of each sequence's."""
        counts = self.counts(tensor)
        if counts is None and tensor.dim() > 1 and len(tensor) == 1:
            tensor = tensor.squeeze(0)
            counts = self.counts(tensor)
        return tensor, counts


def _places(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where each row lies among those of all sequences, filled up to the longest."""
    longest = max(counts)
    places = [i * longest + j for i, count in enumerate(counts) for j in range(count)]
    return torch.tensor(places, device=device)


class ImageSink:
    """
    A [`Sink`] to layers that run on images.

    Args:
        sink ([`Sink`]): The microbatch.
        rows ([`ImageRows`]): How their rows are spread over its sequences.
    """

    num_tokens = None

    def __init__(self, sink: Sink, rows: ImageRows):
        self._sink = sink
        self.rows = rows
        self.num_sequences = sink.num_sequences

    def __getattr__(self, name: str):
        return getattr(self._sink, name)


def modules_on_images(model: nn.Module) -> dict[nn.Module, str | None]:
    """
    The modules of a multimodal model that don't run on the tokens of its sequences, and why their rows can't be told
    apart; `None` where they can. Empty for a language model.
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    if not isinstance(base, PreTrainedModel) or config.get_text_config(decoder=True) is config:
        return {}
    text = {*base.get_decoder().modules()}
    for embedding in (base.get_output_embeddings(), base.get_input_embeddings()):
        text.update(() if embedding is None else embedding.modules())
    outside = [module for module in base.modules() if module not in text]
    pads = getattr(getattr(config, "vision_config", None), "model_type", None) in _PADS_IMAGES
    if placeholder(model) is None or (pads and config.model_type not in _PATCHES):
        return dict.fromkeys(outside, _ENCODER if config.is_encoder_decoder else _UNKNOWN)
    return {module: _UNKNOWN if pads and isinstance(module, nn.Conv2d) else None for module in outside}


def placeholder(model: nn.Module) -> int | None:
    """The id of the tokens that a model's image features take the places of, if its family is a known one."""
    config = getattr(base_model(model), "config", None)
    return config.image_token_id if getattr(config, "model_type", None) in (*_IMAGES, *_PATCHES) else None
