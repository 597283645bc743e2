"""Intra-PROMA: projects a microbatch's gradient off dominant subspaces of its activations and output gradients."""

from .intra_proma import IntraPROMA

__all__ = ["IntraPROMA"]
