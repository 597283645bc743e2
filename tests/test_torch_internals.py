"""What the package makes of PyTorch's private functions."""

import pytest
import torch
from torch import nn

from proma_trl import PROMA, ProjectedAccumulation
from proma_trl.torch_internals import StorageCache


def test_a_value_is_kept_for_a_tensor_and_its_views_of_the_same_shape():
    cache, tensor = StorageCache(), torch.ones(2, 3)
    cache.put(tensor, "value")
    assert cache.get(tensor) == cache.get(tensor.detach()) == "value"
    others = (tensor.clone(), tensor.view(3, 2), tensor[:1], tensor.view(torch.int32), torch.ones(3, 2).T)
    assert [cache.get(other) for other in others] == [None] * len(others)


def test_a_tensor_that_was_written_to_is_another_one():
    cache, tensor = StorageCache(), torch.ones(2, 3)
    cache.put(tensor, "value")
    tensor.add_(1)
    assert cache.get(tensor) is None
    cache.put(tensor, "next")
    tensor.detach()[0] = 0  # through a view
    assert cache.get(tensor) is None


def test_a_value_is_forgotten_with_its_memory(monkeypatch):
    monkeypatch.setattr(StorageCache, "_key", lambda self, tensor: "an address that comes again")
    cache, tensor = StorageCache(), torch.ones(2, 3)
    view = tensor.detach()
    cache.put(tensor, "value")
    del tensor
    assert cache.get(view) == "value"  # its memory lives on
    del view
    assert cache.get(torch.ones(2, 3)) is None


class Branches(nn.Module):
    """Two layers read one tensor, which is scaled between them."""

    def __init__(self, in_place):
        super().__init__()
        self.first, self.second, self.in_place = nn.Linear(6, 5), nn.Linear(6, 5), in_place

    def forward(self, x):
        x, scales = x.clone(), torch.arange(1.0, 7.0)
        left = self.first(x)
        x = x.mul_(scales) if self.in_place else x * scales
        return (left * self.second(x)).sum((1, 2))


@pytest.mark.parametrize("rule,intra_dim", [(PROMA(), 0), (PROMA(method="none"), 2), (PROMA(), 2)])
def test_an_input_may_be_written_to_between_two_layers(rule, intra_dim):
    """Under autocast autograd keeps a copy of it, and so must what is kept for layers with the same input."""

    def gradients(in_place):
        torch.manual_seed(0)
        model = Branches(in_place)
        accumulation = ProjectedAccumulation(model, rule, microbatch_size=3, intra_dim=intra_dim)
        for seed in range(2):
            x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))
            with accumulation.capture(), torch.autocast("cpu", torch.bfloat16):
                objective = model(x)
            accumulation.loss(objective, torch.tensor([1.0, -0.5, 0.3])).backward()
        return {name: param.grad for name, param in model.named_parameters()}

    want = gradients(in_place=False)
    for name, found in gradients(in_place=True).items():
        assert torch.equal(found, want[name]), name
