"""The check of sequence gradients, for loops without a trainer."""

import pytest
import torch
from support.models import Shared
from support.sequences import make_batch, objectives

from proma_trl import ProjectedAccumulation


def test_sequences_are_checked_in_a_loop_of_ones_own():
    """k = 4 images in a model that says nothing of images: a leading dimension of k that is not the sequences'."""

    class Pooled(Shared):
        images = None

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids)
            features = torch.tanh(self.twice(self.images))  # (k, 2, 16)
            pooled = features.flatten(0, 1).roll(1, 0).view_as(features)
            return type("Output", (), {"logits": self.head(self.norm(hidden + pooled.mean(1, keepdim=True)))})

    torch.manual_seed(0)
    model = Pooled()
    model.unused.requires_grad_(False)
    model.images = torch.randn(4, 2, 16)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, _ = make_batch(4, 0)

    def objective(coefficients, microbatch):
        return (objectives(model, ids, mask, weights) * coefficients).sum()

    with pytest.raises(RuntimeError, match=r"wrong for `twice.weight`, `twice.bias`: weighted and summed"):
        accumulation.check_sequences(objective, 4)
    assert all(param.grad is None for param in model.parameters())
    model.images = torch.zeros(4, 2, 16)
    model.twice.requires_grad_(False)
    accumulation.check_sequences(objective, 4)
