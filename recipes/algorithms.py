"""The algorithms that the recipes train with, for those that ask for the names alone."""

from typing import Literal

Algorithm = Literal[
    "proma", "proma_intra", "proma_both", "isopo", "dppo", "reinforce", "grpo", "proma_random", "reinforce_matched"
]
