"""Layers: which yield sequence gradients, which are refused, and how users add their own."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support import oracle
from support.models import Shared, tiny_model
from support.sequences import LENGTH, VOCABULARY, accumulate, expected, make_batches
from torch import nn

from proma_trl import ProjectedAccumulation, register_rule


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(size) + 0.5)
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, values):
        return values * self.gamma * self.gain


class Registered(Scale):
    pass


@register_rule(Registered)
def registered_grads(module, inputs, grad_output):
    gamma = (grad_output * inputs[0] * module.gain).flatten(1, -2).sum(1)
    gain = (grad_output * inputs[0] * module.gamma).flatten(1).sum(1)
    return {"gamma": gamma, "gain": gain}


def with_layer(layer):
    model = tiny_model("llama-untied")
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj, layer)
    return model


def test_a_parameter_of_the_model_itself_is_refused_with_the_ways_out():
    """Running the whole model again would be too much."""
    model = tiny_model("llama-untied")
    model.register_parameter("gain", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError) as error:
        ProjectedAccumulation(model, microbatch_size=4)
    message = str(error.value)
    assert "`the model itself` (LlamaForCausalLM): holds `gain`" in message
    assert "register_rule" in message and "per_device_train_batch_size=1" in message


@pytest.mark.parametrize("k", [1, 4])
def test_an_unknown_layer_runs_again(k):
    model, batches = with_layer(Scale(32)), make_batches("llama-untied", k)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_an_unknown_frozen_layer_is_no_obstacle():
    layer = Scale(32).requires_grad_(False)
    model, batches = with_layer(layer), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_a_registered_rule_is_used():
    model, batches = with_layer(Registered(32)), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_a_rule_that_returns_nonsense_is_named():
    class Broken(Scale):
        pass

    register_rule(Broken)(lambda module, inputs, grad_output: {"gamma": grad_output.sum((0, 1))})
    model, batches = with_layer(Broken(32)), make_batches("llama-untied", 4)
    with pytest.raises(ValueError, match=r"rule for `model.layers.1.mlp.down_proj.1` \(Broken\).*shape \(32,\)"):
        accumulate(model, batches)
    register_rule(Broken)(lambda module, inputs, grad_output: {"gamma": (grad_output * inputs[0]).sum(1)})
    with pytest.raises(ValueError, match="no gradients for its trainable parameter `gain`"):
        accumulate(model, batches)


def test_shared_and_unused_layers():
    torch.manual_seed(0)
    model, batches = Shared(), make_batches("", 4)
    found, _ = accumulate(model, batches)
    assert all(found.pop(name) is None for name in ("unused.weight", "unused.bias"))
    want = expected(model, batches)
    oracle.assert_close(found, {name: grad for name, grad in want.items() if "unused" not in name})


def test_a_use_outside_the_loss_does_not_hold_gradients_back():
    class Aside(Shared):
        def forward(self, input_ids, attention_mask=None):
            output = super().forward(input_ids)
            output.aside = self.twice(self.embedding(input_ids))
            return output

    torch.manual_seed(0)
    model, batches = Aside(), make_batches("", 4)
    found, _ = accumulate(model, batches)
    want = expected(model, batches)
    oracle.assert_close(
        {n: g for n, g in found.items() if "unused" not in n}, {n: g for n, g in want.items() if "unused" not in n}
    )


def test_a_use_outside_the_layer_is_an_error_not_a_wrong_gradient():
    class Borrowing(Shared):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids)
            hidden = self.twice(hidden) + nn.functional.linear(hidden, self.twice.weight)
            return type("Output", (), {"logits": self.head(hidden)})

    model, batches = Borrowing(), make_batches("", 4)
    with pytest.raises(RuntimeError, match=r"`twice.weight` is used outside.*per_device_train_batch_size=1"):
        accumulate(model, batches)
    one = make_batches("", 1)
    found, _ = accumulate(model, one)
    want = expected(model, one)
    names = [n for n in want if want[n].norm() > 0]
    oracle.assert_close({n: found[n] for n in names}, {n: want[n] for n in names})


def test_tokens_that_are_not_sorted_by_sequence_are_an_error():
    class Routed(Shared):
        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids)
            chosen = hidden[input_ids > 40]
            hidden = hidden.masked_scatter((input_ids > 40).unsqueeze(-1), self.twice(chosen))
            return type("Output", (), {"logits": self.head(hidden)})

    with pytest.raises(ValueError, match=r"`twice` ran on a tensor of shape.*can't be told apart"):
        accumulate(Routed(), make_batches("", 4))


def test_a_layer_that_runs_before_the_model_is_an_error():
    model = Shared()
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    with accumulation.capture():
        output = model.twice(torch.randn(4, LENGTH, 16))
    with pytest.raises(RuntimeError, match="No forward pass was captured"):
        accumulation.loss(output.sum((1, 2)), torch.ones(4))
    with pytest.raises(ValueError, match=r"`embedding` ran inside `capture\(\)` before"), accumulation.capture():
        model.embedding(torch.ones(4, LENGTH, dtype=torch.long))


def test_virtual_tokens_are_an_error():
    model = get_peft_model(
        tiny_model("llama-untied"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2)
    )
    with pytest.raises(ValueError, match="PromptTuningConfig"):
        accumulate(model, make_batches("llama-untied", 4))


def test_an_alias_of_a_parameter_is_no_obstacle():
    """As in BERT's head, whose bias is its decoder's."""

    class Aliased(Shared):
        def __init__(self):
            super().__init__()
            self.alias = nn.Module()
            self.alias.bias = self.twice.bias

    torch.manual_seed(0)
    model, batches = Aliased(), make_batches("", 4)
    found, _ = accumulate(model, batches)
    want = expected(model, batches)
    oracle.assert_close(
        {n: g for n, g in found.items() if "unused" not in n}, {n: g for n, g in want.items() if "unused" not in n}
    )


class PickedPositions(nn.Embedding):
    """Whisper's: rows picked by their index."""

    def forward(self, input_ids, position_ids):
        return self.weight[position_ids]


def test_positions_picked_by_index():
    class Positions(Shared):
        def __init__(self):
            super().__init__()
            self.positions = PickedPositions(32, 16)

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embedding(input_ids) + self.positions(input_ids, torch.arange(LENGTH)[None])
            return type("Output", (), {"logits": self.head(self.norm(self.twice(hidden)))})

    torch.manual_seed(0)
    model, batches = Positions(), make_batches("", 4)
    found, _ = accumulate(model, batches)
    want = expected(model, batches)
    names = [n for n in want if "unused" not in n]
    oracle.assert_close({n: found[n] for n in names}, {n: want[n] for n in names})


@pytest.mark.parametrize("kwargs", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_with_other_gradients_are_refused(kwargs):
    model = Shared()
    model.embedding = nn.Embedding(VOCABULARY, 16, **kwargs)
    with pytest.raises(ValueError, match=rf"`embedding` \(Embedding\).*{next(iter(kwargs))}"):
        ProjectedAccumulation(model, microbatch_size=2)
