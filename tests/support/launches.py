"""Launches of several ranks, and what the definition makes of the microbatches that they saw."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import is_deepspeed_available
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support import dppo, intra, oracle
from support.harness import TOKENIZER, batch_objectives, lora_config, make_args, make_model, sequence_objective

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "support"
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


def crashed(run):
    """Whether native code crashed in a rank: it ended with SIGABRT or SIGSEGV, as no Python error makes it end."""
    return run.returncode != 0 and re.search(r"exitcode\s*: -(6|11)\b", run.stdout + run.stderr) is not None


def run_cases(folder, config, cases):
    """Trains all cases in one launch; returns the folder of each."""
    run = launch_cases(folder, config, cases)
    if crashed(run):
        # Seen once, while torch gathered FSDP2's shards through Gloo to save them ("double free or corruption"). The
        # package has no native code, and what is tested is what a launch computes: a second crash is a failure
        warnings.warn(f"A rank's native code crashed; launched again: {run.stderr[-2000:]}", stacklevel=2)
        for name in cases:
            shutil.rmtree(folder / name, ignore_errors=True)
        run = launch_cases(folder, config, cases)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-9000:]
    return {name: folder / name for name in cases}


def initial_model(case, folder):
    model = make_model(case["model"])
    if case.get("lora"):
        model = get_peft_model(model, lora_config(case["model"]))
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
    return average([oracle.accumulate(model, microbatches, **settings) for microbatches in accumulations], args)


def wanted_of_intra(case, folder, model, ranks, step, head):
    """The definition: the mean over ranks of what each makes of its own sequences, with its own random numbers."""
    args = make_args(folder / "unused", **case["args"])
    trainer = SimpleNamespace(args=args, temperature=args.temperature)
    found = []
    for rank, microbatches in enumerate(ranks):
        batches = [batch_objectives(trainer, inputs, len(microbatches)) for inputs in microbatches]
        settings = {"dim": args.intra_dim, "target": args.intra_target, "method": args.projection, "seed": args.seed}
        found.append(intra.accumulate(model, batches, rank=rank, step=step, fused_head=head, **settings))
    return average(found, args)


def average(found, args):
    """The mean over ranks, clipped."""
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
        # Loaded as users load it: a mixture's experts are one by one in the file
        after = AutoModelForCausalLM.from_pretrained(folder / "trained", dtype="auto").state_dict()
    rate = case["args"]["learning_rate"]
    return {name: (value.double() - after[name].double()) / rate for name, value in before.items()}


def assert_the_definitions(case, folder, tolerance=1e-5, **settings):
    """Training changed the weights as the definition does, step by step."""
    model = initial_model(case, folder)
    found, total = change(case, folder, model), {}
    model.double()
    isopo = oracle.Isopo(case["args"]["isopo"]) if "isopo" in case["args"] else None
    shares = []
    for step, ranks in enumerate(steps(folder)):
        if "divergence" in case["args"]:
            shares.append(weigh_tokens(case, folder, model, ranks))
        if "intra_dim" in case["args"]:
            tied = "qwen3" in case["model"]
            head = None if case["lora"] else "model.embed_tokens.weight" if tied else "lm_head.weight"
            grads = wanted_of_intra(case, folder, model, ranks, step, head)
        else:
            grads = wanted(case, folder, model, ranks, weigh=isopo, **settings)
        if isopo is not None:
            isopo.end_step()
        with torch.no_grad():
            for name, grad in grads.items():
                model.get_parameter(name).sub_(case["args"]["learning_rate"] * grad)
                total[name] = total.get(name, 0) + grad
    if shares:
        assert shares[0] == 0 and 0 < shares[1] < 1, shares
    oracle.assert_close(found, total, tolerance)


def weigh_tokens(case, folder, model, ranks):
    """Adds the definition's token weights to the microbatches of a step; returns the share of masked tokens."""
    args, seen = make_args(folder / "unused", **case["args"]), []
    for inputs in (inputs for rank in ranks for inputs in rank):
        inputs["weights"] = dppo.token_weights(args, model, inputs, args.temperature)
        seen.append(inputs["weights"][inputs["completion_mask"].bool()] == 0)
    return torch.cat(seen).double().mean().item()


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
# Running means of the first step enter the second
TWO_STEPS = {"max_steps": 2, "learning_rate": 10.0}
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
        ("qwen3-tied", False, "-isopo", {"isopo": "natural", **TWO_STEPS}),
        ("qwen3-tied", True, "-isopo", {"isopo": "fisher", **TWO_STEPS, "learning_rate": 1.0}),
        ("llama-untied", False, "-isopo-alone", {"isopo": "norm", "projection": "none", **TWO_STEPS}),
    )
}
CASES |= {
    f"{model}{'-lora' if lora else ''}-intra{suffix}": {
        "model": model,
        "lora": lora,
        "args": {**STEP, "intra_dim": 3, "projection": "none", **extra},
    }
    for model, lora, suffix, extra in (
        ("qwen3-tied", False, "", {**TWO_STEPS, "gradient_checkpointing": True}),
        ("qwen3-tied", True, "", {}),
        ("llama-untied", False, "-budget", {"projection_memory_budget": 1e-5}),
        ("llama-untied", False, "-accumulated", {"intra_target": "accumulated"}),
        ("qwen3-tied", False, "-both", {"projection": "iterative"}),
        ("qwen3-tied", True, "-both-single", {"projection": "exact", "per_device_train_batch_size": 1}),
        ("llama-untied", False, "-single", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}),
    )
}
# The second step is on a rollout that the first has made stale
STALE = {**SHORT, "divergence": "topk_tv", "divergence_top_k": 6, "divergence_threshold": 0.01}
CASES |= {
    f"llama-untied{'-lora' if lora else ''}-dppo{suffix}": {
        "model": "llama-untied",
        "lora": lora,
        "prompts": 4,
        "args": {**STEP, **STALE, **extra},
    }
    for lora, suffix, extra in (
        (False, "", {}),
        (False, "-alone", {"projection": "none", "gradient_checkpointing": True}),
        (False, "-global", {"projection_scope": "global", "divergence": "topk_kl"}),
        (
            True,
            "-alone",
            {"projection": "none", "divergence_threshold": 0.08, "divergence_mask": "symmetric", "ratio_cap": 1.01},
        ),
        (False, "-intra", {"projection": "none", "intra_dim": 3}),
    )
}
# Modules that run again in the backward pass
CASES |= {
    f"{model}{'-lora' if lora else ''}-rerun{suffix}": {
        "model": model,
        "lora": lora,
        "args": {**STEP, "learning_rate": 10.0, **extra},
    }
    for model, lora, suffix, extra in (
        ("qwen3-moe", False, "", {}),
        ("qwen3-moe", False, "-global", {"projection_scope": "global", "gradient_checkpointing": True}),
        ("qwen3-moe", True, "", {}),
        ("lfm2", False, "", {"gradient_checkpointing": True}),
    )
}
# A rank without a scored token in a microbatch takes part all the same
CASES |= {
    f"{model}{'-lora' if lora else ''}-unscored{suffix}": {
        "model": model,
        "lora": lora,
        "unscored": ranks,
        "args": {**STEP, **extra},
    }
    for model, lora, ranks, suffix, extra in (
        ("qwen3-tied", False, [1], "", {"projection": "exact"}),
        ("llama-untied", False, [0], "-global", {"projection_scope": "global"}),
        ("llama-untied", False, [1], "-intra", {"intra_dim": 3, "projection": "none"}),
        ("qwen3-tied", True, [1], "-intra-both", {"intra_dim": 3}),
        ("qwen3-tied", False, [0, 1], "-intra-both", {"intra_dim": 3}),
        ("llama-untied", False, [1], "-single", {"per_device_train_batch_size": 1, "intra_dim": 3}),
        ("qwen3-moe", False, [0], "-rerun", {"learning_rate": 10.0}),
    )
}
# A run of three steps, and the same from the checkpoint of its first step: in the launches of some backends
RESUMING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 6, "seed": 3}
RESUMING |= {"model_init_kwargs": {"dtype": "float32"}, "per_device_train_batch_size": 2}
RESUMED = {
    "full": {"args": RESUMING},
    "lora": {"args": RESUMING, "lora": True},
    "intra": {"args": {**RESUMING, "intra_dim": 3}},
    "dppo": {"args": {**RESUMING, "divergence": "topk_tv", "divergence_threshold": 1e-3}},
}
RUNS = {f"whole-{kind}": {"model": "qwen3-tied", **case} for kind, case in RESUMED.items()}
RUNS |= {f"resumed-{kind}": {**RUNS[f"whole-{kind}"], "resume": f"whole-{kind}/run/checkpoint-1"} for kind in RESUMED}
BFLOAT16 = {"model": "llama-untied", "args": {**STEP, "projection_accumulator_dtype": "bfloat16"}}
ALONGSIDE = {"ddp": RUNS} | dict.fromkeys(("zero2", "zero3"), RUNS | {"bfloat16-accumulator": BFLOAT16})
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
