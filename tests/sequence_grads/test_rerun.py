"""The general rule: modules without one of their own run again in the backward pass, one sequence at a time."""

from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import oracle
from support.architectures import tiny_causal_lm
from support.models import tiny_mixture, tiny_model
from support.sequences import accumulate, expected, make_batch, make_batches, objectives, run
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from proma_trl import REINFORCE, ProjectedAccumulation, ProjectionSettings

FAMILIES = [
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "FalconH1ForCausalLM",
    "Lfm2ForCausalLM",
    "Qwen3NextForCausalLM",
    "JambaForCausalLM",
]


def tiny(name):
    return tiny_causal_lm(name, dtype=torch.float32)


@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, k, method):
    """In double precision, as recurrences lose digits in single."""
    if (k, method) == (8, "exact") and name in ("Mamba2ForCausalLM", "Qwen3NextForCausalLM"):
        pytest.skip("its recurrence is in float32: the rank of eight gradients of four numbers is one of rounding")
    model, batches = tiny_causal_lm(name, dtype=torch.float64), make_batches("gemma2-softcap", k, count=2)
    found, _ = accumulate(model, batches, ProjectionSettings(method=method))
    # DeepSeek's router multiplies in single precision in any model
    tolerance = 1e-7 if name == "DeepseekV3ForCausalLM" else 1e-9
    oracle.assert_close(found, expected(model, batches, method=method), tolerance)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_families(name, k):
    """On projections of attention and of mixers. PEFT refuses those that a mixer's kernel may use itself."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "in_proj", "in_proj_qkvz"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_causal_lm(name, dtype=torch.float64), config, autocast_adapter_dtype=False)
    batches = make_batches("gemma2-softcap", k, count=2)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches), 1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM", "FalconH1ForCausalLM"])
def test_checkpointing_changes_nothing(name, use_reentrant):
    model, batches = tiny(name), make_batches("gemma2-softcap", 3, count=2)
    plain, _ = accumulate(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, {name: grad.double() for name, grad in plain.items()}, 1e-6)


@pytest.mark.parametrize("targets", [None, ["mlp.experts.gate_up_proj"], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts(family, targets):
    """PEFT's `ParamWrapper`, also one around another: what the outer one changes is there when the inner one runs."""
    base = tiny_mixture(family)
    base.set_experts_implementation("eager")  # the grouped kernel has no float64
    names = None if targets is None else [f"mlp.experts.{name.split('.')[-1]}" for name in targets]
    config = LoraConfig(r=4, target_modules="all-linear", target_parameters=names, task_type="CAUSAL_LM")
    config.init_lora_weights = False
    model, batches = get_peft_model(base, config), make_batches("gemma2-softcap", 3, count=2)
    found, _ = accumulate(model, batches)
    assert any("experts" in name for name in found) or (family == "gpt_oss" and targets is None)
    oracle.assert_close(found, expected(model, batches))


def with_module(module):
    """A model that runs a module behind its second layer's MLP."""
    model = tiny_model("llama-untied")
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj, module)
    return model


class Gain(nn.Module):
    """Multiplies by a parameter, in whatever way a test has."""

    def __init__(self, shape=(32,)):
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, values):
        return values * self.gain


class Noisy(Gain):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, values):
        return self.dropout(values * self.gain)


def test_random_numbers_are_those_of_the_forward_pass():
    model, (batch, *_) = with_module(Noisy()).train(), make_batches("llama-untied", 4)
    ids, mask, weights, _ = batch
    accumulation = ProjectedAccumulation(model, OneHot(), microbatch_size=4)
    for i in range(4):
        model.zero_grad()
        torch.manual_seed(7)
        objectives(model, ids, mask, weights)[i].backward()
        want = {name: p.grad.double() for name, p in model.named_parameters()}
        torch.manual_seed(7)
        run(accumulation, [(ids, mask, weights, torch.eye(4)[i])])
        after = torch.rand(())
        oracle.assert_close({name: p.grad for name, p in model.named_parameters()}, want)
    torch.manual_seed(7)
    objectives(model, ids, mask, weights)
    assert torch.rand(()) == after  # as many as without the general rule


class OneHot(REINFORCE):
    """REINFORCE by coefficients, so that a microbatch with one advantage emits that sequence's gradient."""

    is_plain = False


class Mixing(Gain):
    def forward(self, values):
        return values * self.gain - values.mean(0, keepdim=True)


class Reordering(Gain):
    def forward(self, values):
        return (values * self.gain).flip(0)


class Flattening(Gain):
    """Its output has no dimension of sequences."""

    def forward(self, values):
        return (values * self.gain).flatten()[: values[0].numel()].view(1, *values.shape[1:])


@pytest.mark.parametrize("kind", [Mixing, Reordering, Flattening])
def test_modules_that_do_not_treat_sequences_one_by_one_are_refused_by_name(kind):
    model, batches = with_module(kind()), make_batches("llama-untied", 4)
    with pytest.raises(RuntimeError, match=rf"`model.layers.1.mlp.down_proj.1` \({kind.__name__}\) does not treat"):
        accumulate(model, batches)


class Placed(nn.Module):
    """Is given a table of positions `(T, d)`, the same for all sequences, beside `(k * T, d)` rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = TwoArguments()

    def forward(self, values):
        k, length, size = values.shape
        table = torch.linspace(0.5, 2, length * size).view(length, size)
        output, rest = self.inner(values.flatten(0, 1), table=table, sequences=k, extras=(values[:, :1], None))
        return output.view_as(values) + rest["shift"]


class TwoArguments(Gain):
    def forward(self, rows, table, sequences, extras):
        table = table.repeat(len(rows) // len(table), 1)
        return rows * self.gain * table, {"shift": extras[0] * self.gain.flip(0), "count": sequences}


@pytest.mark.parametrize("lengths", [(9, 4), (4, 9), (4, 4)])
def test_a_table_of_positions_is_no_sequence(lengths):
    """Also where there are as many positions as sequences, in the first microbatch or in a later one."""
    model, batches = with_module(Placed()), []
    for seed, length in enumerate(lengths):
        ids, _, weights, advantages = make_batch(4, seed)
        weights = weights[:, -(length - 1) :] + 0.1
        batches.append((ids[:, -length:].clamp(min=3), torch.ones(4, length, dtype=torch.long), weights, advantages))
    if lengths[0] == 4:
        with pytest.raises(RuntimeError, match=r"`model.layers.1.mlp.down_proj.1.inner` .*does not treat"):
            accumulate(model, batches)
        return
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_a_microbatch_of_one_sequence_tells_nothing_about_others():
    """As the last one of an epoch can be: everything has a leading dimension of one in it."""
    model = with_module(Table())
    batches = [make_batch(k, seed) for seed, k in enumerate((1, 4, 1, 3))]
    found, _ = accumulate(model, batches, microbatch_size=4)
    oracle.assert_close(found, expected(model, batches))


class Table(nn.Module):
    """Gives its child a table `(1, T, d)`."""

    def __init__(self):
        super().__init__()
        self.inner = WithTable()

    def forward(self, values):
        return self.inner(values, torch.linspace(0.5, 2, values[0].numel()).view(1, *values.shape[1:]))


class WithTable(Gain):
    def forward(self, values, table):
        return values * self.gain * table


def test_a_kernel_that_takes_a_childs_parameters():
    class Mixer(nn.Module):
        """Never runs its convolution."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv1d(32, 32, 3, groups=32)
            self.out = nn.Linear(32, 32)

        def forward(self, values):
            padded = nn.functional.pad(values.mT, (2, 0))
            return self.out(nn.functional.conv1d(padded, self.conv.weight, self.conv.bias, groups=32).mT)

    model, batches = with_module(Mixer()), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    assert accumulation.rerun_names() == ["model.layers.1.mlp.down_proj.1"]
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_a_module_that_runs_twice_and_one_that_never_does():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.unused = Gain(), Gain()

        def forward(self, values):
            return self.gain(torch.tanh(self.gain(values)))

    model, batches = with_module(Twice()), make_batches("llama-untied", 3)
    found, _ = accumulate(model, batches)
    unused = "model.layers.1.mlp.down_proj.1.unused.gain"
    assert found.pop(unused) is None
    want = expected(model, batches)
    oracle.assert_close(found, {name: grad for name, grad in want.items() if name != unused})


def test_bfloat16_autocast_is_that_of_the_forward_pass():
    """Within bfloat16's rounding, and far from an ordinary gradient."""
    model, batches = tiny("Qwen3MoeForCausalLM"), make_batches("gemma2-softcap", 4, count=2)
    found, _ = accumulate(model, batches, autocast=True)
    want, plain = expected(model, batches), expected(model, batches, method="none")
    error, distance = (
        sum((x[n].double() - y[n]).square().sum() for n in want) for x, y in ((found, want), (want, plain))
    )
    assert error < 0.1 * distance


class Transposing(nn.Module):
    """Gives its child tokens first, and sequences second."""

    def __init__(self):
        super().__init__()
        self.child = Gain()

    def forward(self, values):
        return self.child(values.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(values))).transpose(0, 1)


def checked(accumulation, batch):
    """As the trainer does with its first microbatch."""
    ids, mask, weights, _ = batch
    accumulation.check_sequences(lambda r, _: (objectives(accumulation.model, ids, mask, weights) * r).sum(), len(ids))


def test_a_parent_runs_again_where_its_child_is_not_given_sequences():
    model, batches = with_module(Transposing()), make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    assert accumulation.rerun_names() == ["model.layers.1.mlp.down_proj.1.child"]
    checked(accumulation, batches[0])
    assert accumulation.rerun_names() == ["model.layers.1.mlp.down_proj.1"]
    run(accumulation, batches)
    found = {name: p.grad for name, p in model.named_parameters()}
    oracle.assert_close(found, expected(model, batches))


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "GPTNeoXJapaneseForCausalLM"])
def test_families_whose_parents_run_again(name):
    """Experts that get all tokens once for each of them; a bias that a layer hands to its parent."""
    model, batches = tiny_causal_lm(name), make_batches("gemma2-softcap", 3, count=2)
    accumulation = ProjectedAccumulation(model, microbatch_size=3)
    before = accumulation.rerun_names()
    checked(accumulation, batches[0])
    assert accumulation.rerun_names() != before
    run(accumulation, batches)
    found = {name: p.grad for name, p in model.named_parameters()}
    oracle.assert_close(found, expected(model, batches), 1e-9)


def test_where_no_parent_can_run_again_the_module_is_refused_by_name():
    model = tiny_model("llama-untied")
    model.model.layers[0].forward = MethodType(mixing_forward, model.model.layers[0])
    model.model.layers[0].gain = nn.Parameter(torch.ones(32))
    batches = make_batches("llama-untied", 4)
    accumulation = ProjectedAccumulation(model, microbatch_size=4)
    with pytest.raises(RuntimeError, match=r"`model.layers.0` \(LlamaDecoderLayer\) does not treat"):
        checked(accumulation, batches[0])


def mixing_forward(self, hidden_states, **kwargs):
    return type(self).forward(self, hidden_states * self.gain - hidden_states.mean(0, keepdim=True), **kwargs)


def test_a_mask_with_infinities_among_the_outputs():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def forward(self, values):
            output, mask = self.child(values)
            return output + mask.exp()

    class Child(Gain):
        def forward(self, values):
            return values * self.gain, torch.where(values > 0, values * self.gain, -torch.inf)

    model, batches = with_module(Parent()), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


@pytest.mark.parametrize("kind", ["heads", "second"])
def test_sequences_beside_something_else(kind):
    """An argument with the heads of all sequences, and one with the sequences in its second dimension."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def forward(self, values):
            k, length, _ = values.shape
            if kind == "heads":
                return self.child(values, values.view(k, length, 4, -1).transpose(1, 2).flatten(0, 1))
            return self.child(values, torch.stack([values, 2 * values]))

    class Child(Gain):
        def forward(self, values, more):
            if kind == "heads":
                more = more.unflatten(0, (len(values), 4)).transpose(1, 2).flatten(2)
            else:
                more = more[1]
            return values * self.gain + torch.tanh(more) * self.gain.square()

    model, batches = with_module(Parent()), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


class Aside(nn.Module):
    """Normalizes means over sequences and tokens as well, and uses them or not."""

    def __init__(self, used):
        super().__init__()
        self.norm, self.used = LlamaRMSNorm(32), used

    def forward(self, values):
        aside = self.norm(values.flatten(0, 1).mean(0, keepdim=True))
        return values + aside if self.used else values


def test_a_norm_without_a_gradient_need_not_tell_sequences_apart():
    model, batches = with_module(Aside(used=False)), make_batches("llama-untied", 4)
    found, _ = accumulate(model, batches)
    unused = "model.layers.1.mlp.down_proj.1.norm.weight"
    assert found.pop(unused) is None
    want = expected(model, batches)
    oracle.assert_close(found, {name: grad for name, grad in want.items() if name != unused})
    with pytest.raises(RuntimeError, match=rf"`{unused}` is used .* on a tensor in which the sequences can't be told"):
        accumulate(with_module(Aside(used=True)), batches)


def test_a_layer_with_a_rule_does_not_run_again():
    model = tiny_model("qwen3-tied")
    assert ProjectedAccumulation(model, microbatch_size=4).rerun_names() == []
    assert ProjectedAccumulation(tiny_mixture("gpt_oss"), microbatch_size=1).rerun_names() == []
