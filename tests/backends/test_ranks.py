"""Two ranks: what the optimizer does with every backend, held against the float64 definition."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file
from support.launches import (
    BACKENDS,
    BFLOAT16,
    CASES,
    RESUMED,
    STEP,
    accelerate_config,
    assert_the_definitions,
    change,
    initial_model,
    launch_cases,
    marked,
    run_cases,
    steps,
    wanted,
)
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", marked(BACKENDS))
def test_the_step_is_the_definitions(backend, case, results):
    folder = results(backend)[case]
    if case.endswith("short"):
        assert [len(ranks[0]) for ranks in steps(folder)] == [3, 1]
    assert_the_definitions(CASES[case], folder, method=CASES[case]["args"].get("projection", "iterative"))


def deepspeed_file(folder, zero, **settings):
    """DeepSpeed's own configuration, as users have who set more than Accelerate's questions ask for."""
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(auto, "auto"), **settings}))
    return accelerate_config("zero3", folder, deepspeed_config_file=str(path), zero3_init_flag=False)


SAVE = {"stage3_gather_16bit_weights_on_model_save": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
DEEPSPEED_SETTINGS = {
    "zero3-nothing-stays-whole": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "reduce_bucket_size": 1000,
        **SAVE,
    },
    "zero2-many-buckets": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True},
    "zero2-offload": {"stage": 2, **OFFLOAD},
    "zero3-offload": {"stage": 3, **OFFLOAD, **SAVE},
}


@pytest.mark.parametrize("zero", marked(DEEPSPEED_SETTINGS))
def test_deepspeeds_settings_change_nothing(zero, tmp_path):
    settings = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    config = deepspeed_file(tmp_path, DEEPSPEED_SETTINGS[zero], **settings)
    names = ["llama-untied-local", "qwen3-tied-global", "qwen3-tied-lora-local-checkpointing", "qwen3-tied-intra"]
    names += ["qwen3-moe-rerun", "qwen3-moe-lora-rerun", "lfm2-rerun"]
    for name, folder in run_cases(tmp_path, config, {name: CASES[name] for name in names}).items():
        assert_the_definitions(CASES[name], folder)


@pytest.mark.parametrize("backend", marked(["zero1", "zero2", "zero3"]))
def test_bfloat16_weights(backend, tmp_path):
    """Nearer to PROMA than to REINFORCE by far: rounding is not what is projected."""
    args = {**STEP, "learning_rate": 1e4, "bf16": True}
    cases = {
        "float32": {"model": "llama-untied", "args": args},
        "bfloat16": {"model": "llama-untied", "args": {**args, "projection_accumulator_dtype": "bfloat16"}},
        "global": {"model": "llama-untied", "args": {**args, "projection_scope": "global"}},
    }
    config = accelerate_config(backend, tmp_path, mixed_precision="bf16")
    for name, folder in run_cases(tmp_path, config, cases).items():
        model = initial_model(cases[name], folder)
        found = flat(change(cases[name], folder, model))
        (ranks,) = steps(folder)
        proma, reinforce = (flat(wanted(cases[name], folder, model, ranks, method=m)) for m in ("iterative", "none"))
        assert (found - proma).norm() < 0.4 * (found - reinforce).norm(), name


def flat(grads):
    return torch.cat([grad.flatten() for grad in grads.values()])


@pytest.mark.parametrize("backend", marked(["zero2", "zero3"]))
def test_a_bfloat16_accumulator_is_nearly_exact(backend, results):
    folder = results(backend)["bfloat16-accumulator"]
    assert_the_definitions(BFLOAT16, folder, tolerance=5e-3)
    with pytest.raises(AssertionError, match="relative error"):
        assert_the_definitions(BFLOAT16, folder, tolerance=1e-5)


@pytest.mark.parametrize("backend", marked(["ddp", "zero2", "zero3"]))
def test_resuming_ends_with_the_same_weights(backend, results):
    """Also where the checkpoint falls between two optimizer steps on one generation."""
    folders = results(backend)
    for kind in RESUMED:
        name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
        whole, resumed = (load_file(folders[f"{run}-{kind}"] / "trained" / name) for run in ("whole", "resumed"))
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("backend", marked(["ddp", "zero3"]))
def test_a_rank_that_dies_ends_the_run_and_leaves_the_last_checkpoint(backend, tmp_path):
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    args |= {"model_init_kwargs": {"dtype": "float32"}}
    case = {"model": "qwen3-tied", "args": args, "dies_at": 2}
    config = accelerate_config(BACKENDS[backend][0], tmp_path)
    start = time.monotonic()
    run = launch_cases(tmp_path, config, {"dies": case})
    assert run.returncode != 0 and "SIGKILL" in run.stdout + run.stderr
    assert time.monotonic() - start < 120
    checkpoint = tmp_path / "dies" / "run" / "checkpoint-2"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = {"model": "qwen3-tied", "args": args, "resume": str(checkpoint)}
    folder = run_cases(tmp_path, config, {"resumed": resumed})["resumed"]
    assert len(steps(folder)) == 1
