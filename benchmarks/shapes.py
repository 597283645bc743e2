"""Sizes of the models that benchmarks run or compute with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated feed-forward layers."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool


# The published Qwen3 models
SHAPES = {
    "0.6B": Shape(1024, 28, 3072, 16, 8, 128, 151_936, True),
    "1.7B": Shape(2048, 28, 6144, 16, 8, 128, 151_936, True),
    "8B": Shape(4096, 36, 12_288, 32, 8, 128, 151_936, False),
}
