"""How many operations the update rule adds to a backward pass."""

from collections import Counter

import pytest
from support.models import tiny_model
from support.sequences import make_batches, objectives
from torch.utils._python_dispatch import TorchDispatchMode

from proma_trl import ProjectedAccumulation, ProjectionSettings


class CountOperations(TorchDispatchMode):
    """Counts what a GPU would be asked to do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(architecture, k, layers, settings=None):
    """What the second microbatch's backward pass takes beyond an ordinary one, and in how many tensors."""
    model = tiny_model(architecture, num_hidden_layers=layers)
    microbatches = make_batches(architecture, k, 2)
    accumulation = ProjectedAccumulation(model, settings, microbatch_size=k)
    for ids, mask, weights, advantages in microbatches:
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        loss = accumulation.loss(objective, advantages)
        with CountOperations() as counted:
            loss.backward()
    return counted.counts, len(list(model.parameters()))


@pytest.mark.parametrize("method", ["iterative", "exact"])
def test_operations_do_not_grow_with_the_microbatch(method):
    """No loop over sequences, and none that waits for the device to know a value."""
    settings = ProjectionSettings(method=method)
    few, _ = operations("llama-untied", 2, 2, settings)
    many, _ = operations("llama-untied", 8, 2, settings)
    assert few == many
    assert not {"_local_scalar_dense", "item", "is_nonzero"} & set(many)


def test_operations_a_tensor():
    """Launches count on a GPU: those of each further tensor, its ordinary gradient's included."""
    two, tensors_of_two = operations("llama-untied", 4, 2)
    four, tensors_of_four = operations("llama-untied", 4, 4)
    views = {
        "view",
        "t",
        "transpose",
        "detach",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "alias",
        "as_strided",
    }
    views |= {"_unsafe_view", "permute", "split", "diagonal", "split_with_sizes", "_reshape_alias"}
    launches = sum(n for name, n in (four - two).items() if name not in views)
    assert launches <= 45 * (tensors_of_four - tensors_of_two)
