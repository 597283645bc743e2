"""Which layers are followed."""

import copy

import pytest
import torch
from torch import nn

from proma_trl import PROMA, ProjectedAccumulation
from proma_trl.sequence_grads import plan_layers


class Aliased(nn.Module):
    """A model that holds its embedding's weight under a name of its own, as exports of models do."""

    def __init__(self, other_parameter=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.ones(6)) if other_parameter else self.embed.weight

    def forward(self, input_ids):
        return self.out(self.embed(input_ids)).square().sum((1, 2))


def test_another_name_of_what_a_layer_holds_needs_no_rule():
    model = Aliased()
    assert [layer.name for layer in plan_layers(model)] == ["embed", "out"]
    ids, advantages = torch.arange(24).view(2, 3, 4) % 11, torch.tensor([1.0, -0.5, 0.25])
    reference = copy.deepcopy(model)
    accumulation = ProjectedAccumulation(model, PROMA(method="none"), microbatch_size=3)
    for batch in ids:
        with accumulation.capture():
            objective = model(input_ids=batch)
        accumulation.loss(objective, advantages).backward()
        (reference(batch) * advantages).sum().backward()
    for (name, param), want in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param.grad, want.grad, msg=name)


def test_a_parameter_that_no_layer_holds_is_refused():
    with pytest.raises(ValueError, match=r"`the model itself` \(Aliased\): holds `table` and has no rule"):
        plan_layers(Aliased(other_parameter=True))
