"""The projected accumulation in a plain PyTorch loop, against the float64 definition."""

import copy
from collections import Counter

import oracle
import pytest
import torch
from accelerate import Accelerator
from models import ARCHITECTURES, tiny_llava, tiny_mixture, tiny_model, tiny_qwen_vl
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from proma_trl import ProjectedAccumulation, ProjectionSettings, register_rule

VOCABULARY, LENGTH = 97, 12


def make_batch(k, seed, left_padding=True):
    """Token ids, attention mask, weights of the scored tokens, and advantages with a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (k, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(k):
        left, right = (i % 3 if left_padding else 0), (2 * i) % 5
        mask[i, :left] = 0
        mask[i, LENGTH - right :] = 0
    ids = ids * mask
    weights = (mask[:, 1:] * mask[:, :-1]).float() * (0.5 + torch.rand(k, LENGTH - 1, generator=generator))
    weights[:, :4] = 0
    advantages = torch.randn(k, generator=generator)
    if k > 1:
        advantages[seed % k] = 0
    return ids, mask, weights, advantages


def objectives(model, ids, mask, weights):
    """`-sum_t w_t log p(y_t)` for each sequence, `(k,)`."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return -(log_probs * weights).sum(-1) / LENGTH


def run(accumulation, batches, autocast=False, scale=1):
    """Accumulates some microbatches in the model's gradients."""
    model = accumulation.model
    model.zero_grad()
    for ids, mask, weights, advantages in batches:
        with accumulation.capture(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            objective = objectives(model, ids, mask, weights)
        (accumulation.loss(objective, advantages) * scale).backward()


def accumulate(model, batches, settings=None, microbatch_size=None, autocast=False, scale=1, **kwargs):
    """Gradients that PROMA leaves in a model after some microbatches, and its metrics."""
    size = microbatch_size or max(len(batch[0]) for batch in batches)
    accumulation = ProjectedAccumulation(model, settings, microbatch_size=size, **kwargs)
    run(accumulation, batches, autocast, scale)
    metrics = accumulation.pop_metrics()
    accumulation.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()  # so that no later backward pass adds to them
    return gradients, metrics


def expected(model, batches, **settings):
    def one(ids, mask, weights, i):
        return lambda m: objectives(m, ids[i : i + 1], mask[i : i + 1], weights[i : i + 1])[0]

    return oracle.accumulate(
        model,
        [([one(*batch[:3], i) for i in range(len(batch[0]))], batch[3]) for batch in batches],
        **settings,
    )


def make_batches(architecture, k, count=3):
    # Eager attention in float64 is NaN where transformers masks all of a position's keys
    return [make_batch(k, seed, left_padding=architecture != "gemma2-softcap") for seed in range(count)]


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


SETTINGS = {
    "exact": {"method": "exact"},
    "none": {"method": "none"},
    "unbounded": {"bound": None},
    "exact-unbounded": {"method": "exact", "bound": None},
    "one-sweep": {"sweeps": 1},
    "weak": {"strength": 0.4},
    "tight": {"bound": 0.05},
}


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2"])
def test_every_setting(architecture, settings, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    found, _ = accumulate(model, batches, ProjectionSettings(**settings))
    oracle.assert_close(found, expected(model, batches, **settings))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2", "opt", "gemma"])
def test_checkpointing_changes_nothing(architecture, use_reentrant, k):
    model, batches = tiny_model(architecture), make_batches(architecture, k)
    plain, _ = accumulate(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    found, _ = accumulate(model, batches)
    for name, grad in plain.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("budget", [1e-7, 3e-6, 2e-5])
def test_a_small_memory_budget_changes_nothing(architecture, budget):
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    found, _ = accumulate(model, batches, memory_budget=budget)
    oracle.assert_close(found, expected(model, batches))


def lora(model, **kwargs):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    return model


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("kwargs", [{}, {"bias": "all"}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_lora(kwargs, k):
    model = lora(tiny_model("qwen2-biases" if "bias" in kwargs else "llama-untied"), **kwargs)
    batches = make_batches("llama-untied", k)
    found, _ = accumulate(model, batches)
    assert all("lora" in name or kwargs for name in found)
    oracle.assert_close(found, expected(model, batches))


def test_frozen_parameters_have_no_hooks():
    model = lora(tiny_model("llama-untied"))
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    hooked = {name for name, module in model.named_modules() if module._forward_hooks}
    assert hooked and all("lora_" in name for name in hooked)
    accumulation.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parameters_frozen_later_are_followed():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    model.model.layers[0].requires_grad_(False)
    run(accumulation, batches)
    oracle.assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected(model, batches))


@pytest.mark.parametrize("architecture", ["qwen3-tied", "gpt2", "gemma"])
def test_bfloat16_autocast_accumulates_in_float32(architecture):
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    found, _ = accumulate(model, batches, autocast=True)
    plain = copy.deepcopy(model)
    plain.zero_grad()
    for ids, mask, weights, advantages in batches:
        with torch.autocast("cpu", torch.bfloat16):
            objective = objectives(plain, ids, mask, weights)
        (objective * advantages).sum().backward()
    reinforce = expected(model, batches, method="none")
    proma = expected(model, batches)
    for name, param in plain.named_parameters():
        assert found[name].dtype == torch.float32
        norm = proma[name].norm()
        if norm > 1e-6:
            # No further from the definition than ordinary autocast training is from its own
            rounding = (param.grad.double() - reinforce[name]).norm() / reinforce[name].norm()
            assert (found[name].double() - proma[name]).norm() <= max(2 * rounding, 0.02) * norm, name


def test_bfloat16_weights():
    model, batches = tiny_model("qwen3-tied", dtype=torch.bfloat16), make_batches("qwen3-tied", 4)
    found, _ = accumulate(model, batches)
    want = expected(model, batches)
    for name, grad in found.items():
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - want[name]).norm() <= 0.05 * want[name].norm(), name


@pytest.mark.parametrize("architecture", ["qwen3-tied", "opt"])
def test_padding_contributes_nothing(architecture):
    """Other tokens under the mask of completions change no gradient; nor does a wholly masked sequence."""
    model, batches = tiny_model(architecture), make_batches(architecture, 4)
    found, _ = accumulate(model, batches)
    changed = []
    for ids, mask, weights, advantages in batches:
        scored = torch.cat([torch.zeros(len(ids), 1), weights], 1).cumsum(1)
        after = (mask == 0) & (scored > 0)
        changed.append((torch.where(after, 5, ids), mask, weights, advantages))
    assert any((a[0] != b[0]).any() for a, b in zip(batches, changed, strict=True))
    again, _ = accumulate(model, changed)
    for name, grad in found.items():
        assert (again[name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-6), name


def test_an_all_masked_microbatch_changes_nothing():
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    found, _ = accumulate(model, batches[:2])
    ids, mask, weights, advantages = batches[2]
    again, _ = accumulate(model, [*batches[:2], (ids, mask, 0 * weights, advantages)])
    for name, grad in found.items():
        assert torch.equal(again[name], grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen2-biases"])
def test_a_sequence_of_rounding_noise_is_skipped(architecture, method, dtype):
    """A repeated token has no gradient in queries and keys, but for rounding, whose direction is random."""
    model = tiny_model(architecture, dtype=dtype)
    batches = [make_batch(4, seed) for seed in range(3)]
    for ids, mask, _, _ in batches[1:]:
        ids[1] = 5 * mask[1]
    found, _ = accumulate(model, batches, ProjectionSettings(method=method))
    oracle.assert_close(found, expected(model, batches, method=method))


def test_a_shorter_last_microbatch():
    model = tiny_model("qwen3-tied")
    batches = [make_batch(4, 0), make_batch(4, 1), make_batch(3, 2), make_batch(1, 3)]
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_scaled_losses_scale_the_gradient():
    """As Accelerate's division by the number of microbatches, or a gradient scaler, does."""
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    scaled, _ = accumulate(model, batches, scale=256)
    for name in found:
        assert (scaled[name] / 256 - found[name]).norm() <= 1e-5 * found[name].norm(), name


def test_a_sum_of_objectives_is_enough():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    model.zero_grad()
    for ids, mask, weights, advantages in batches:
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        loss = accumulation.loss(objective.sum(), advantages, value=(objective * advantages).sum())
        assert loss.item() == pytest.approx((objective * advantages).sum().item())
        loss.backward()
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, found[name]), name


def test_accelerate_loop():
    """The README's loop: `accelerator.accumulate` and `accelerator.backward`, gradients at the optimizer's step."""
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 4)
    want = expected(model, batches)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(batches))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for ids, mask, weights, advantages in batches:
        with accelerator.accumulate(model):
            with accumulation.capture():
                objective = objectives(model, ids, mask, weights)
            accelerator.backward(accumulation.loss(objective, advantages))
            optimizer.step()
            optimizer.zero_grad()
    for name, param in model.named_parameters():
        step = (before[name] - param.detach()).double() / 0.1 * len(batches)
        assert (step - want[name]).norm() <= 1e-3 * want[name].norm(), name


def test_metrics_say_what_was_removed():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    first = expected(model, batches[:1])
    both = expected(model, batches[:2])
    policy = expected(model, batches[1:2])
    _, metrics = accumulate(model, batches[:2])
    removed = sum((first[n] + policy[n] - both[n]).norm() ** 2 for n in first) ** 0.5
    norm = sum(first[n].norm() ** 2 for n in first) ** 0.5
    bounded = [(first[n] + policy[n] - both[n]).norm() / policy[n].norm() > 0.5 - 1e-6 for n in first]
    assert metrics["projection/norm_ratio"] == pytest.approx(float(removed / norm), rel=1e-4)
    assert metrics["projection/bounded_fraction"] == pytest.approx(sum(bounded) / len(bounded))
    assert 0 < metrics["projection/overlap"] < 1
    assert accumulate(model, batches[:1])[1] == {}


# Layers of users


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


def test_an_unknown_layer_is_refused_with_the_ways_out():
    with pytest.raises(ValueError) as error:
        ProjectedAccumulation(with_layer(Scale(32)), microbatch_size=4)
    message = str(error.value)
    assert "`model.layers.1.mlp.down_proj.1` (Scale)" in message
    assert "register_rule" in message and "per_device_train_batch_size=1" in message


def test_an_unknown_layer_works_with_one_sequence_a_microbatch():
    model, batches = with_layer(Scale(32)), make_batches("llama-untied", 1)
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


class Shared(nn.Module):
    """A linear layer that runs twice, and one that never does."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.twice = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        update = self.twice(torch.tanh(self.twice(hidden)))
        update += hidden  # models do write to a layer's output in place
        return type("Output", (), {"logits": self.head(self.norm(update).cumsum(1))})


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


# Errors of use


def test_more_sequences_than_declared_are_refused():
    model = tiny_model("llama-untied")
    with pytest.raises(ValueError, match="holds 4 sequences, more than `microbatch_size=1`"):
        accumulate(model, make_batches("", 4), microbatch_size=1)


def test_a_loss_without_a_capture_is_refused():
    accumulation = ProjectedAccumulation(tiny_model("llama-untied"), microbatch_size=2)
    with pytest.raises(RuntimeError, match="No forward pass was captured"):
        accumulation.loss(torch.zeros(2), torch.zeros(2))


def test_a_backward_around_the_loss_is_refused():
    model = tiny_model("llama-untied")
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, _ = make_batch(4, 0)
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(RuntimeError, match=r"without `accumulation.loss`"):
        objective.sum().backward()


@pytest.mark.parametrize("k", [1, 4])
def test_two_losses_in_one_backward_are_refused(k):
    model = tiny_model("llama-untied")
    accumulation = ProjectedAccumulation(model, microbatch_size=k)
    losses = []
    for seed in range(2):
        ids, mask, weights, advantages = make_batch(k, seed)
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        losses.append(accumulation.loss(objective, advantages))
    with pytest.raises(RuntimeError, match="losses of two microbatches"):
        sum(losses).backward()


def test_captures_may_come_before_backwards():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    losses = []
    for ids, mask, weights, advantages in batches:
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        losses.append(accumulation.loss(objective, advantages))
    for loss in losses:
        loss.backward()
    oracle.assert_close({name: p.grad for name, p in model.named_parameters()}, expected(model, batches))


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
    with pytest.raises(ValueError, match="can't be told apart"):
        accumulate(model, make_batches("llama-untied", 4))


def test_ordinary_backward_passes_beside_a_captured_one():
    """With checkpointing, whose recomputation must not be taken for the captured microbatch's."""
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    want, _ = accumulate(model, batches[:1])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ordinary = objectives(model, *batches[1][:3]).sum()
    ids, mask, weights, advantages = batches[0]
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    loss = accumulation.loss(objective, advantages)
    ordinary.backward()
    model.zero_grad()
    loss.backward()
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, want[name]), name


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


def test_shapes_are_checked():
    model = tiny_model("llama-untied")
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, advantages = make_batch(4, 0)
    with accumulation.capture():
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(ValueError, match="`advantages` must hold one number for each of 4 sequences"):
        accumulation.loss(objective, advantages[:3])
    with pytest.raises(ValueError, match="`objective` must have shape"):
        accumulation.loss(objective[:3], advantages)
    with pytest.raises(ValueError, match="`value` is required"):
        accumulation.loss(objective.sum(), advantages)


@pytest.mark.parametrize(
    "kwargs,name", [({"microbatch_size": 0}, "microbatch_size"), ({"memory_budget": 0}, "budget")]
)
def test_arguments_are_checked(kwargs, name):
    with pytest.raises(ValueError, match=name):
        ProjectedAccumulation(nn.Linear(2, 2), **{"microbatch_size": 1, **kwargs})


@pytest.mark.parametrize("kwargs", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_with_other_gradients_are_refused(kwargs):
    model = Shared()
    model.embedding = nn.Embedding(VOCABULARY, 16, **kwargs)
    with pytest.raises(ValueError, match=rf"`embedding` \(Embedding\).*{next(iter(kwargs))}"):
        ProjectedAccumulation(model, microbatch_size=2)


def test_a_backward_pass_that_failed_leaves_no_trace():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    want, _ = accumulate(model, batches)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    ids, mask, weights, advantages = batches[0]

    def fail(grad):
        raise KeyboardInterrupt

    with accumulation.capture():
        handle = model.model.layers[0].register_full_backward_pre_hook(lambda module, grad: fail(grad))
        objective = objectives(model, ids, mask, weights)
    with pytest.raises(KeyboardInterrupt):
        accumulation.loss(objective, advantages).backward()
    handle.remove()
    model.zero_grad()
    objectives(model, ids, mask, weights).sum().backward()
    run(accumulation, batches)
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, want[name]), name


def test_forward_passes_outside_a_capture_are_ordinary():
    model, batches = tiny_model("llama-untied"), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=2)
    model.zero_grad()
    ids, mask, weights, advantages = batches[0]
    (objectives(model, ids, mask, weights) * advantages).sum().backward()
    oracle.assert_close(
        {name: p.grad for name, p in model.named_parameters()}, expected(model, batches[:1], method="none")
    )
    accumulation.detach()


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


# Leading dimensions that are not the sequences'


def image_batch(counts, seed):
    """Two sequences with some images each, of four tokens an image."""
    ids, mask, weights, advantages = make_batch(2, seed, left_padding=False)
    mask[:] = 1
    ids = ids.clamp(max=95)
    for i, count in enumerate(counts):
        ids[i, : 4 * count] = 96
    images = torch.randn(sum(counts), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ids, images, weights, advantages


@pytest.mark.parametrize("trained", ["multi_modal_projector", "vision_tower"])
def test_layers_on_images_are_refused_whatever_their_number(trained):
    model = tiny_llava()
    model.requires_grad_(False)
    getattr(model.model, trained).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"(?s)`model.{trained}.*outside the text decoder.*microbatch_size=1"):
        ProjectedAccumulation(model, microbatch_size=2)
    assert ProjectedAccumulation(model, microbatch_size=1)


@pytest.mark.parametrize("counts", [(1, 1), (2, 0), (0, 2)])
def test_a_text_decoder_beside_frozen_images(counts):
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    accumulation = ProjectedAccumulation(model, microbatch_size=2)

    def objective(m, ids, images, weights):
        logits = m(input_ids=ids, pixel_values=images.to(m.dtype) if len(images) else None).logits[:, :-1]
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return -(log_probs * weights).sum(-1) / LENGTH

    def one(ids, images, weights, i):
        own = images[: counts[0]] if i == 0 else images[counts[0] :]
        return lambda m: objective(m, ids[i : i + 1], own, weights[i : i + 1])[0]

    batches = [image_batch(counts, seed) for seed in range(3)]
    for ids, images, weights, advantages in batches:
        with accumulation.capture():
            values = objective(model, ids, images, weights)
        accumulation.loss(values, advantages).backward()
    want = oracle.accumulate(model, [([one(*b[:3], i) for i in range(2)], b[3]) for b in batches])
    oracle.assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, want)


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


@pytest.mark.parametrize("target_parameters", [None, ["mlp.experts.gate_up_proj"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen2_5_vl"])
def test_adapters_whose_sequences_cannot_be_seen_are_refused_when_made(family, target_parameters):
    model = tiny_qwen_vl() if family == "qwen2_5_vl" else tiny_mixture(family)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        target_parameters=target_parameters if family != "qwen2_5_vl" else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    if family == "gpt_oss" and target_parameters is None:  # adapters in the attention's linear layers alone
        batches = make_batches("", 4)
        found, _ = accumulate(model, batches)
        assert found and all(grad is not None for grad in found.values())
        return
    reason = "outside the text decoder" if family == "qwen2_5_vl" else "`ParamWrapper` multiplies its weights"
    with pytest.raises(ValueError, match=rf"(?s)lora_A.default` \(Linear\).*{reason}.*microbatch_size=1"):
        ProjectedAccumulation(model, microbatch_size=2)
