"""What the trainer checks and refuses, at construction and on the first microbatch."""

import copy
import inspect
from types import MethodType

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from support import oracle
from support.harness import (
    LORA,
    TOKENIZER,
    GradientRecorder,
    check,
    definition,
    inputs_for,
    make_args,
    make_inputs,
    make_model,
    make_trainer,
    trainer_gradients,
)
from transformers import BartConfig, BartForCausalLM, BartForConditionalGeneration, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from proma_trl import ProjectedAccumulation, PROMATrainer


def test_trl_methods_keep_their_signatures():
    """Positional calls from TRL, or from code written for it, must not fail."""
    for name, method in vars(PROMATrainer).items():
        original = inspect.getattr_static(GRPOTrainer, name, None)
        if inspect.isfunction(method) and original is not None:
            want = [(p.name, p.kind) for p in inspect.signature(original).parameters.values()]
            assert [(p.name, p.kind) for p in inspect.signature(method).parameters.values()] == want, name
    assert PROMATrainer.get_off_policy_mask is GRPOTrainer.get_off_policy_mask


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("term", ["sign", "square", "gradient"])
def test_a_loss_that_is_not_linear_in_the_advantages_is_refused(term, k, tmp_path, monkeypatch):
    original = GRPOTrainer._compute_loss
    loss = {
        "sign": lambda loss, advantages: loss * (1 + 0.1 * (advantages > 0).float().mean()),
        "square": lambda loss, advantages: loss + 0.01 * advantages.square().sum(),
        # Its value is right, its gradient is not: as with a ratio that is clipped, on-policy
        "gradient": lambda loss, advantages: torch.where(
            (advantages < 0).any(), 1.5 * loss - 0.5 * loss.detach(), loss
        ),
    }[term]
    monkeypatch.setattr(
        GRPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: loss(original(self, model, inputs), inputs["advantages"]),
    )
    trainer = make_trainer(tmp_path, per_device_train_batch_size=k, generation_batch_size=4)
    with pytest.raises(RuntimeError, match=r"`loss_type='dapo'`\) is not linear in the advantages.*`GRPOTrainer`"):
        trainer_gradients(trainer, inputs_for("qwen3-tied", k))


METHODS = {
    "proma": {},
    "isopo": {"projection": "none", "isopo": "natural"},
    "intra": {"projection": "none", "intra_dim": 2},
    "both": {"intra_dim": 2},
}


def with_term(trainer_class):
    """As TRL's documentation shows."""

    class WithTerm(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return 2 * loss + 0.1 * sum(p.square().sum() for p in model.parameters())

    return WithTerm


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_term_that_a_subclass_adds_is_refused(method, k, tmp_path):
    settings = {"per_device_train_batch_size": k, "generation_batch_size": 4, **METHODS[method]}
    trainer = make_trainer(tmp_path, trainer_class=with_term(PROMATrainer), **settings)
    with pytest.raises(RuntimeError, match=r"a term outside the captured objective.*`GRPOTrainer`") as error:
        trainer_gradients(trainer, inputs_for("qwen3-tied", k))
    assert "one sequence" not in str(error.value)
    assert all(param.grad is None for param in trainer.model.parameters())


@pytest.mark.parametrize("k", [1, 4])
def test_reinforce_takes_a_term_as_grpo_does(k, tmp_path):
    microbatches = inputs_for("qwen3-tied", k)
    settings = {"per_device_train_batch_size": k, "generation_batch_size": 4}
    trainer = make_trainer(tmp_path, trainer_class=with_term(PROMATrainer), projection="none", **settings)
    grpo = make_trainer(tmp_path, None, with_term(GRPOTrainer), GRPOConfig, **settings)
    found, want = (trainer_gradients(x, microbatches)[0] for x in (trainer, grpo))
    for name, grad in want.items():
        assert torch.equal(found[name], grad), name


class WithPenalty(GRPOTrainer):
    """Between TRL's class and ours, its term is within what is captured."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) + 0.1 * sum(p.square().sum() for p in model.parameters())


class PROMAWithPenalty(PROMATrainer, WithPenalty):
    pass


@pytest.mark.parametrize("k", [1, 4])
def test_a_term_that_a_class_beneath_adds_is_refused(k, tmp_path):
    settings = {"per_device_train_batch_size": k, "generation_batch_size": 4}
    trainer = make_trainer(tmp_path, trainer_class=PROMAWithPenalty, **settings)
    with pytest.raises(RuntimeError, match=r"`WithPenalty._compute_loss` adds to TRL's loss .*use `GRPOTrainer`"):
        trainer_gradients(trainer, inputs_for("qwen3-tied", k))


def overflowing(trainer, microbatches):
    """The gradients of microbatches after one whose activations were no numbers."""
    weight = trainer.model.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, 0] = torch.inf
    first, _ = trainer_gradients(trainer, microbatches[:1])
    assert any(not grad.isfinite().all() for grad in first.values() if grad is not None) and not trainer._checked
    with torch.no_grad():
        weight.copy_(before)
    return trainer_gradients(trainer, microbatches)[0]


@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen3-moe", "falcon-h1"])
@pytest.mark.parametrize("kwargs", [{}, {"intra_dim": 2}, {"projection": "none", "intra_dim": 2}])
def test_a_first_gradient_that_is_not_finite_is_passed_over(kwargs, architecture, tmp_path):
    """As GRPO does. The checks, also those of layers that run again, wait for the next step."""
    microbatches = inputs_for("qwen3-tied", 4)
    if architecture == "qwen3-moe":
        kwargs = {**kwargs, "router_aux_loss_coef": 0.0}
    trainer = make_trainer(tmp_path, make_model(architecture), **kwargs)
    found = overflowing(trainer, microbatches)
    assert trainer._checked
    if trainer.accumulation.intra is None:
        oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)))


def test_the_check_that_waited_still_refuses(tmp_path):
    model = make_model()
    layer = model.model.layers[1].mlp
    layer.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    layer.register_forward_hook(lambda module, args, output: output.flip(0))
    trainer = make_trainer(tmp_path, model)
    with pytest.raises(RuntimeError, match=r"wrong for `model.layers.1.mlp.gate_proj.weight`"):
        overflowing(trainer, inputs_for("qwen3-tied", 4))


@pytest.mark.parametrize("kwargs", [{}, {"projection": "none", "divergence": "binary_tv"}])
def test_checks_of_the_loss_wait_for_numbers(kwargs, tmp_path):
    trainer = make_trainer(tmp_path, **kwargs)
    inputs = {**make_inputs(4, 0), "sampling_per_token_logps": torch.full((4, 7), -2.0)}
    trainer_gradients(trainer, [{**inputs, "advantages": torch.full((4,), torch.nan)}])
    assert not trainer._checked
    trainer_gradients(trainer, [inputs])
    assert trainer._checked


@pytest.mark.parametrize("kwargs", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_layers_that_mix_sequences_are_refused_at_the_first_microbatch(kwargs, tmp_path):
    """A leading dimension of k that is not the sequences': here they are in another order."""

    model = make_model()
    layer = model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    layer.register_forward_hook(lambda module, args, output: output.flip(0))
    trainer = make_trainer(tmp_path, model, **kwargs)
    with pytest.raises(RuntimeError, match=r"wrong for `model.layers.0.mlp.gate_proj.weight`.*down_proj") as error:
        trainer_gradients(trainer, inputs_for("qwen3-tied", 4))
    assert "layers.1" not in str(error.value) and "self_attn" not in str(error.value)


def test_the_checks_of_the_first_microbatch_leave_no_trace(tmp_path):
    """Random numbers, metrics and gradients are those of a run without the checks."""
    model = make_model(attention_dropout=0.3)
    microbatches = inputs_for("qwen3-tied", 4)
    results = []
    for checked in (False, True):
        trainer = make_trainer(tmp_path, copy.deepcopy(model))
        trainer._checked = checked
        torch.manual_seed(5)
        gradients, losses = trainer_gradients(trainer, microbatches)
        results.append((gradients, losses, dict(trainer._metrics["train"]), torch.rand(())))
    (checked, losses, metrics, random), (plain, plain_losses, plain_metrics, plain_random) = results
    assert losses == plain_losses and metrics == plain_metrics and random == plain_random
    assert len(metrics["entropy"]) == len(microbatches)
    for name, grad in plain.items():
        assert torch.equal(checked[name], grad), name


def test_kernels_that_are_applied_when_training_begins_are_seen(tmp_path, monkeypatch):
    """As Liger's: a norm that takes no copies of its weight, set on single modules after the trainer was made."""

    def apply_kernels(model, config):
        def forward(self, hidden):
            assert self.weight.dim() == 1
            return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * self.weight

        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = MethodType(forward, module)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply_kernels)
    recorder = GradientRecorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], max_grad_norm=0.0)
    trainer.args.use_liger_kernel = True
    initial, microbatches = copy.deepcopy(trainer.model.state_dict()), []
    original = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: microbatches.append(dict(inputs)) or original(model, inputs)
    assert not trainer.accumulation.rerun_names()
    trainer.train()
    assert "model.layers.0.self_attn.q_norm" in trainer.accumulation.rerun_names()
    trainer.model.load_state_dict(initial)
    oracle.assert_close(recorder.gradients, oracle.accumulate(*definition(trainer, microbatches)))


def test_one_microbatch_a_step_is_said_to_be_reinforce(tmp_path, caplog):
    with pytest.warns(
        UserWarning, match=r"`projection='iterative'` has no effect with `gradient_accumulation_steps=1`"
    ):
        trainer = make_trainer(tmp_path, gradient_accumulation_steps=1)
    trainer.train()
    assert [r.message for r in caplog.records if "has no effect" in r.message and r.name.startswith("proma_trl")]
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "PROMA" not in card.replace("proma-trl", "") and "projection" not in card and "REINFORCE" in card


def test_settings_that_act_are_not_warned_of(tmp_path, recwarn):
    make_trainer(tmp_path, projection_sweeps=3, projection_bound=None, projection_memory_budget=0.1)
    make_trainer(tmp_path, projection="none")
    assert not [w for w in recwarn if "has no effect" in str(w.message)]


def test_other_configurations_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `PROMAConfig`, got `GRPOConfig`"):
        make_trainer(tmp_path, args=make_args(tmp_path, GRPOConfig))


def test_token_level_advantages_are_refused_at_the_first_batch(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = make_inputs(4, 0)
    inputs["advantages"] = inputs["advantages"].unsqueeze(1).expand(-1, 7)
    with pytest.raises(ValueError, match=r"shape \(4, 7\) weigh tokens, not sequences.*GRPOTrainer"):
        trainer.compute_loss(trainer.model.train(), inputs)


def tiny_moe(**kwargs):
    config = Qwen3MoeConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        **kwargs,
    )
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def test_the_load_balancing_loss_of_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"load-balancing.*`router_aux_loss_coef=0.0`"):
        make_trainer(tmp_path, tiny_moe())


@pytest.mark.parametrize("k", [1, 4, 8])
def test_experts(k, tmp_path):
    settings = {"router_aux_loss_coef": 0.0, "per_device_train_batch_size": k, "generation_batch_size": 8}
    check(make_trainer(tmp_path, tiny_moe(), **settings), inputs_for("qwen3-moe", k))


def test_compiled_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"compiled model.*--dynamo_backend"):
        make_trainer(tmp_path)


def test_reducing_every_microbatch_is_refused(tmp_path):
    def reduce_each():  # transformers writes to what it is given
        return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}

    with pytest.raises(ValueError, match=r"`sync_each_batch`.*`projection=\"none\"`"):
        make_trainer(tmp_path, accelerator_config=reduce_each())
    make_trainer(tmp_path, accelerator_config=reduce_each(), projection="none")


def test_a_changed_fused_head_is_refused(tmp_path, monkeypatch):
    from trl.trainer import utils

    monkeypatch.delattr(utils, "maybe_gather_lm_head_ctx")
    with pytest.raises(RuntimeError, match=r"maybe_gather_lm_head_ctx.*Install a TRL version"):
        make_trainer(tmp_path)


ALGORITHMS = {
    "PROMA": {},
    "Intra-PROMA": {"projection": "none", "intra_dim": 3},
    "ISOPO": {"projection": "none", "isopo": "natural"},
    "DPPO": {"projection": "none", "divergence": "binary_tv"},
    "REINFORCE": {"projection": "none"},
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(make_model(), LORA).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_to_train_is_refused(algorithm, adapter, tmp_path):
    settings = ALGORITHMS[algorithm]
    with pytest.raises(ValueError, match=r"nothing to train.*`Qwen3ForCausalLM`.*Set `requires_grad`.*`peft_config`"):
        make_trainer(tmp_path, make_model().requires_grad_(False), **settings)
    for_inference = PeftModel.from_pretrained(make_model(), adapter)
    with pytest.raises(ValueError, match=r"for inference.*`PeftModel.from_pretrained\(\.\.\., is_trainable=True\)`"):
        make_trainer(tmp_path, for_inference, **settings)
    make_trainer(tmp_path, PeftModel.from_pretrained(make_model(), adapter, is_trainable=True), **settings)


def test_adapters_that_transformers_has_loaded_for_inference(adapter, tmp_path):
    model = make_model()
    model.load_adapter(adapter)
    with pytest.raises(ValueError, match=r"for inference.*`model.load_adapter\(\.\.\., is_trainable=True\)`"):
        make_trainer(tmp_path, model)
    model = make_model()
    model.load_adapter(adapter, is_trainable=True)
    make_trainer(tmp_path, model)


def test_new_adapters_on_a_frozen_model_train(tmp_path):
    make_trainer(tmp_path, make_model().requires_grad_(False), peft_config=LORA)


@pytest.mark.parametrize("k", [1, 4])
def test_a_loop_with_nothing_to_train(k):
    with pytest.raises(ValueError, match="nothing to train"):
        ProjectedAccumulation(make_model().requires_grad_(False), microbatch_size=k)


@pytest.mark.parametrize("given", [False, True])
def test_prompt_tuning_is_refused_at_construction(given, tmp_path):
    def make(**kwargs):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        adapted = {"model": get_peft_model(make_model(), config)} if given else {"peft_config": config}
        return make_trainer(tmp_path, **adapted, **kwargs)

    with pytest.raises(
        ValueError, match=r"(?s)`prompt_encoder.*makes virtual tokens once.*per_device_train_batch_size=1"
    ):
        make()
    for works in ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {"projection": "none"}):
        assert make(**works).train().global_step == 1


@pytest.mark.parametrize(
    "settings", [*ALGORITHMS.values(), {"per_device_train_batch_size": 1, "generation_batch_size": 4}]
)
def test_encoder_decoder_models_are_refused_by_name(settings, tmp_path):
    config = BartConfig(
        vocab_size=len(TOKENIZER),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    with pytest.raises(
        ValueError, match=r"`BartForConditionalGeneration` is an encoder-decoder model.*Use a decoder-only"
    ):
        make_trainer(tmp_path, BartForConditionalGeneration(config), **settings)
    with pytest.raises(ValueError, match=r"runs in the encoder of an encoder-decoder model") as error:
        ProjectedAccumulation(BartForConditionalGeneration(config), microbatch_size=2)
    assert "image" not in str(error.value)
    # Its decoder alone is one like others
    make_trainer(tmp_path, BartForCausalLM(config), **settings)
