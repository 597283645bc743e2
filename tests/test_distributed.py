"""Two ranks: what the optimizer does with every backend, held against the float64 definition."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
import yaml
from accelerate.utils import is_deepspeed_available
from harness import LORA, TOKENIZER, make_args, make_model, sequence_objective
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from proma_trl import ProjectedAccumulation

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "distributed"
RANKS = 2


def accelerate_config(name, folder, mixed_precision="no", use_cpu=True, **deepspeed):
    """A configuration of `recipes/accelerate`, for two CPU ranks, with another DeepSpeed part if one is given."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text())
    config |= {"use_cpu": use_cpu, "num_processes": RANKS, "mixed_precision": mixed_precision}
    config["main_process_port"] = 0  # any that is free
    if deepspeed:
        del config["mixed_precision"]  # it would be in the file
        config["deepspeed_config"] = deepspeed
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(config, *command, timeout=300):
    """Starts a script on all ranks, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launch_cases(folder, config, cases):
    """Starts the worker on `cases`."""
    for name in {case["model"] for case in cases.values()}:
        make_model(name).save_pretrained(folder / "models" / name)
        TOKENIZER.save_pretrained(folder / "models" / name)
    listed = [{**case, "name": name, "model": str(folder / "models" / case["model"])} for name, case in cases.items()]
    (folder / "cases.json").write_text(json.dumps(listed))
    return launch(config, SCRIPTS / "worker.py", folder / "cases.json", folder)


def run_cases(folder, config, cases):
    """Trains all cases in one launch; returns the folder of each."""
    run = launch_cases(folder, config, cases)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-9000:]
    return {name: folder / name for name in cases}


def initial_model(case, folder):
    model = make_model(case["model"])
    if case.get("lora"):
        model = get_peft_model(model, LORA)
        loaded = model.load_state_dict(torch.load(folder / "adapter.pt"), strict=False)
        assert not loaded.unexpected_keys
    return model


def steps(folder):
    """What each rank's loss was given, step by step: `steps[i][rank]` are the microbatches of an accumulation."""
    ranks = []
    for rank in range(RANKS):
        accumulations = [[]]
        for inputs in torch.load(folder / f"inputs_{rank}.pt"):
            accumulations[-1].append({**inputs, "num_items_in_batch": inputs["num_items_in_batch"] / RANKS})
            if inputs["boundary"]:
                accumulations.append([])
        assert not accumulations.pop()
        ranks.append(accumulations)
    assert not torch.equal(ranks[0][0][0]["completion_ids"], ranks[1][0][0]["completion_ids"])
    assert any((m["advantages"] != 0).any() for rank in ranks for m in rank[0])
    return list(zip(*ranks, strict=True))


def wanted(case, folder, model, ranks, **settings):
    """The definition: the mean over ranks of each rank's PROMA, or PROMA of all ranks' sequences together."""
    args = make_args(folder / "unused", **case["args"])
    trainer = SimpleNamespace(args=args, temperature=args.temperature)

    def objectives(inputs, count):
        k = len(inputs["advantages"])
        return [sequence_objective(trainer, inputs, i, count) for i in range(k)], inputs["advantages"]

    accumulations = [[objectives(m, len(microbatches)) for m in microbatches] for microbatches in ranks]
    if args.projection_scope == "global":
        unions = zip(*accumulations, strict=True)
        accumulations = [[([f for fs, _ in union for f in fs], torch.cat([a for _, a in union])) for union in unions]]
    found = [oracle.accumulate(model, microbatches, **settings) for microbatches in accumulations]
    grads = {name: sum(grads[name] for grads in found) / RANKS for name in found[0]}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    scale = min(1.0, args.max_grad_norm / norm.item()) if args.max_grad_norm else 1.0
    return {name: scale * grad for name, grad in grads.items()}


def change(case, folder, model):
    """What training subtracted from the weights, in units of the learning rate."""
    before = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if case.get("lora"):
        saved = load_file(folder / "trained" / "adapter_model.safetensors")
        after = {name: saved[name.replace(".default", "")] for name in before}
    else:
        after = load_file(folder / "trained" / "model.safetensors")
    rate = case["args"]["learning_rate"]
    return {name: (value.double() - after[name].double()) / rate for name, value in before.items()}


def assert_the_definitions(case, folder, tolerance=1e-5, **settings):
    """Training changed the weights as the definition does, step by step."""
    model = initial_model(case, folder)
    found, total = change(case, folder, model), {}
    model.double()
    for ranks in steps(folder):
        grads = wanted(case, folder, model, ranks, **settings)
        with torch.no_grad():
            for name, grad in grads.items():
                model.get_parameter(name).sub_(case["args"]["learning_rate"] * grad)
                total[name] = total.get(name, 0) + grad
    oracle.assert_close(found, total, tolerance)


# One optimizer step of plain gradient descent: what changes is the gradient. The rate is so large that float32 weights
# show it to seven digits.
STEP = {
    "optim": "sgd",
    "learning_rate": 100.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
    "num_generations": 3,
    "model_init_kwargs": {"dtype": "float32"},
}
# One generation of four microbatches: an accumulation of three, and an off-policy one of one
SHORT = {
    "max_steps": -1,
    "num_train_epochs": 1,
    "steps_per_generation": 4,
    "num_generations": 4,
    "learning_rate": 1.0,
}
CASES = {
    f"{model}{'-lora' if lora else ''}-{scope}{suffix}": {
        "model": model,
        "lora": lora,
        "prompts": 4 if suffix == "-short" else 64,
        "args": {**STEP, "projection_scope": scope, **extra},
    }
    for scope in ("local", "global")
    for model, lora, suffix, extra in (
        ("llama-untied", False, "", {}),
        ("qwen3-tied", False, "", {}),
        ("qwen3-tied", True, "", {}),
        ("qwen3-tied", False, "-checkpointing", {"gradient_checkpointing": True}),
        ("qwen3-tied", True, "-checkpointing", {"gradient_checkpointing": True}),
        ("llama-untied", False, "-single", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}),
        ("llama-untied", False, "-clipped", {"max_grad_norm": 0.1}),
        ("llama-untied", False, "-short", SHORT),
        ("llama-untied", False, "-budget", {"projection_memory_budget": 1e-5, "projection": "exact"}),
    )
}
BACKENDS = {
    "ddp": ("multi_gpu", {}),
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
    "fsdp2": ("multi_gpu", {"fsdp": True}),
}


def marked(backends):
    """The backends, as parameters that are skipped where DeepSpeed is not there."""
    missing = pytest.mark.skipif(not is_deepspeed_available(), reason="needs deepspeed")
    return [pytest.param(name, marks=missing if name.startswith("zero") else ()) for name in backends]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Trains all cases of a backend in one launch, when the first of them is asked for."""
    done = {}

    def run(backend):
        if backend not in done:
            name, options = BACKENDS[backend]
            folder = tmp_path_factory.mktemp(backend)
            cases = {name: {**case, **options} for name, case in CASES.items()}
            done[backend] = run_cases(folder, accelerate_config(name, folder), cases)
        return done[backend]

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", marked(BACKENDS))
def test_the_step_is_the_definitions(backend, case, results):
    folder = results(backend)[case]
    if case.endswith("short"):
        assert [len(ranks[0]) for ranks in steps(folder)] == [3, 1]
    assert_the_definitions(CASES[case], folder, method=CASES[case]["args"].get("projection", "iterative"))


GPU_BACKENDS = ["multi_gpu", "zero1", "zero2", "zero3", "fsdp2"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA devices: NCCL, and Accelerate's FSDP2")
@pytest.mark.parametrize("backend", marked(GPU_BACKENDS))
def test_the_step_is_the_definitions_on_gpus(backend, tmp_path):
    config = accelerate_config(backend, tmp_path, use_cpu=False)
    cases = {name: {**case, "args": {**case["args"], "use_cpu": False, "tf32": False}} for name, case in CASES.items()}
    for name, folder in run_cases(tmp_path, config, cases).items():
        method = CASES[name]["args"].get("projection", "iterative")
        assert_the_definitions(CASES[name], folder, tolerance=1e-4, method=method)


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
    names = ["llama-untied-local", "qwen3-tied-global", "qwen3-tied-lora-local-checkpointing"]
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
def test_a_bfloat16_accumulator_is_nearly_exact(backend, tmp_path):
    case = {"model": "llama-untied", "args": {**STEP, "projection_accumulator_dtype": "bfloat16"}}
    folder = run_cases(tmp_path, accelerate_config(backend, tmp_path), {"case": case})["case"]
    assert_the_definitions(case, folder, tolerance=5e-3)
    with pytest.raises(AssertionError, match="relative error"):
        assert_the_definitions(case, folder, tolerance=1e-5)


@pytest.mark.parametrize("backend", marked(["ddp", "zero2", "zero3"]))
def test_resuming_ends_with_the_same_weights(backend, tmp_path):
    """Also where the checkpoint falls between two optimizer steps on one generation."""
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 6, "seed": 3}
    args |= {"model_init_kwargs": {"dtype": "float32"}, "per_device_train_batch_size": 2}
    cases = {}
    for lora in (False, True):
        whole = f"whole-{lora}"
        cases[whole] = {"model": "qwen3-tied", "lora": lora, "args": args}
        checkpoint = tmp_path / whole / "run" / "checkpoint-1"
        cases[f"resumed-{lora}"] = {**cases[whole], "resume": str(checkpoint)}
    folders = run_cases(tmp_path, accelerate_config(BACKENDS[backend][0], tmp_path), cases)
    for lora in (False, True):
        name = "adapter_model.safetensors" if lora else "model.safetensors"
        whole, resumed = (load_file(folders[f"{run}-{lora}"] / "trained" / name) for run in ("whole", "resumed"))
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


@pytest.mark.parametrize("mark", ["ds_id", "param_idx_in_group"])
def test_deepspeed_needs_to_know_where_an_accumulation_ends(mark):
    model = make_model()
    accumulation = ProjectedAccumulation(model, microbatch_size=2)
    setattr(next(model.parameters()), mark, 0)
    with pytest.raises(RuntimeError, match="needs the `accelerator`"), accumulation.capture():
        pass


def test_a_global_scope_needs_to_know_where_an_accumulation_ends():
    with pytest.raises(ValueError, match=r"`scope=\"global\"` needs the `accelerator`"):
        ProjectedAccumulation(make_model(), microbatch_size=2, scope="global")
    with pytest.raises(ValueError, match="`scope` must be one of 'local', 'global', got 'node'"):
        ProjectedAccumulation(make_model(), microbatch_size=2, scope="node")


def test_loops_without_a_trainer():
    """DDP and FSDP2 by hand; W ranks in a global scope take the step of one rank with all their sequences."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    run = subprocess.run(
        [*command, str(SCRIPTS / "loop.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-9000:]
    assert "all held" in run.stdout
