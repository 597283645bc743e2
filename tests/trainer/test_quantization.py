"""QLoRA: adapters on a model that bitsandbytes has quantized, with its build for CPUs."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import oracle
from support.harness import (
    LORA,
    StepRecorder,
    make_model,
    make_trainer,
    sequence_objective,
)
from support.sequences import accumulate, expected, make_batches, objectives
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from proma_trl import PROMA

pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`: `make test-quantization`")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
# Sizes that its products on a CPU can take
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama-untied", **SIZES).save_pretrained(path)
    return path


def quantized(folder, dtype=torch.float32, **settings):
    config = BitsAndBytesConfig(**(settings or NF4))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(folder, **settings):
    torch.manual_seed(1)
    return get_peft_model(quantized(folder, **settings), LORA)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_adapters_on_four_bits(folder, k, method, checkpointing):
    model, batches = adapted(folder), make_batches("llama-untied", k, count=2)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    found, _ = accumulate(model, batches, PROMA(method=method))
    oracle.assert_close(found, expected(model, batches, as_it_is=True, method=method))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training(folder, dtype, tmp_path):
    """What reaches the optimizer, the adapters' dtype, and that nothing else is trained."""
    recorder = StepRecorder()
    trainer = make_trainer_on(folder, tmp_path, peft_config=LORA, adapter_dtype=dtype, max_steps=2)
    recorder.follow(trainer)
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    for name, param in trainer.model.named_parameters():
        assert param.requires_grad == ("lora_" in name)
        if param.requires_grad:
            assert param.dtype == getattr(torch, dtype) and not torch.equal(param, before[name])
        elif param.is_floating_point():  # a CPU's generation packs quantized ones anew
            assert torch.equal(param, before[name]), name
    if dtype == "float32":
        weights, found, microbatches = recorder.steps[1]
        trainer.accumulation.detach()
        with torch.no_grad():
            for name, param in trainer.model.named_parameters():
                if param.requires_grad:
                    param.copy_(weights[name])
        sets = [
            ([sequence_objective(trainer, m, i, len(microbatches)) for i in range(4)], m["advantages"])
            for m in microbatches
        ]
        oracle.assert_close(found, oracle.accumulate(trainer.model, sets, as_it_is=True))


def make_trainer_on(folder, output_dir, model=None, **kwargs):
    model = quantized(folder) if model is None else model
    return make_trainer(output_dir, model, max_grad_norm=0.0, **kwargs)


def test_loaded_adapters_keep_every_bit(folder, tmp_path):
    model = adapted(folder)
    before = copy.deepcopy({name: p.data for name, p in model.named_parameters() if p.requires_grad})
    trainer = make_trainer_on(folder, tmp_path, model, adapter_dtype="float32")
    after = {name: p.data for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(x, x.bfloat16().float()) for x in after.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_a_model_loaded_in_half_precision(folder, modules_to_save, bf16, tmp_path):
    """Adapters in float32 between layers in bfloat16. Whole layers stay in what they are given."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=modules_to_save)
    model = quantized(folder, torch.bfloat16, **{**NF4, "bnb_4bit_compute_dtype": torch.bfloat16})
    settings = {"peft_config": config, "adapter_dtype": "float32", "bf16": bf16}
    trainer = make_trainer_on(folder, tmp_path, model, **settings)
    trainer.train()
    dtypes = {name.split(".")[-3]: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert dtypes.pop("lora_A") == dtypes.pop("lora_B") == torch.float32
    assert set(dtypes.values()) <= {torch.bfloat16} and bool(dtypes) == bool(modules_to_save)


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_no_effect_without_quantization(peft_config, tmp_path):
    with pytest.warns(UserWarning, match='`adapter_dtype="float32"` has no effect'):
        make_trainer(tmp_path, peft_config=peft_config, adapter_dtype="float32")


def test_eight_bits(folder):
    """Its products are in half precision, and depend on the whole microbatch's inputs."""
    model, batches = adapted(folder, load_in_8bit=True), make_batches("llama-untied", 3, count=1)
    model.train()
    found, _ = accumulate(model, batches)
    ids, mask, weights, advantages = batches[0]
    (objectives(model, ids, mask, weights) * advantages).sum().backward()
    oracle.assert_close(found, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
