"""What is said of GRPOConfig's fields covers the installed versions, and is true."""

import re
from dataclasses import MISSING, field, fields, make_dataclass
from itertools import combinations

import pytest
from support.harness import make_args
from trl import GRPOConfig

from proma_trl import DPPOConfig, PROMAConfig
from proma_trl.trainer import config
from proma_trl.trainer.grpo_fields import KNOWN, OTHER_MEANING, PARTLY_REFUSED, REFUSED, SAME

LISTS = (SAME, REFUSED, PARTLY_REFUSED, OTHER_MEANING)

DEFAULTS = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(GRPOConfig)}

# Values of fields whose default does not tell their type, or that allow few
OTHER_VALUES = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "bf16": True,
    "cache_implementation": "static",
    "chat_template_kwargs": {"enable_thinking": False},
    "data_seed": 1,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_prefetch_factor": 2,
    "ddp_broadcast_buffers": False,
    "ddp_bucket_cap_mb": 25,
    "ddp_find_unused_parameters": False,
    "ddp_static_graph": False,
    "debug": "underflow_overflow",
    "delta": 1.5,
    "disable_tqdm": True,
    "epsilon_high": 0.28,
    "eval_accumulation_steps": 2,
    "eval_steps": 2,
    "eval_strategy": "steps",
    "generation_batch_size": 24,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "greater_is_better": True,
    "hub_model_id": "me/my-model",
    "hub_private_repo": True,
    "hub_revision": "main",
    "hub_strategy": "end",
    "hub_token": "token",
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "all",
    "label_names": ["labels"],
    "liger_kernel_config": {"rope": True},
    "log_level": "info",
    "log_level_replica": "info",
    "logging_dir": "logs",
    "logging_strategy": "epoch",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "lr_scheduler_type": "cosine",
    "max_tool_calling_iterations": 2,
    "metric_for_best_model": "reward",
    "min_p": 0.1,
    "model_init_kwargs": {"dtype": "float32"},
    "multi_objective_aggregation": "normalize_then_sum",
    "neftune_noise_alpha": 5.0,
    "num_completions_to_print": 2,
    "num_generations": 2,
    "num_generations_eval": 2,
    "off_policy_mask_threshold": 0.5,
    "optim_args": "foreach=False",
    "optim_target_modules": "all-linear",
    "pad_to_multiple_of": 8,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "resume_from_checkpoint": "checkpoint-1",
    "reward_weights": [1.0],
    "run_name": "run",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "scale_rewards": "batch",
    "steps_per_generation": 6,
    "tf32": False,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "torch_empty_cache_steps": 2,
    "trackio_bucket_id": "me/bucket",
    "trackio_space_id": "me/space",
    "trackio_static_space_id": "me/static",
    "train_sampling_strategy": "sequential",
    "transformers_continuous_batching_config": {"max_queue_size": 2},
    "use_cpu": True,
    "vllm_max_model_length": 512,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_server_base_url": "http://localhost:8000",
    "vllm_structured_outputs_regex": "a*",
    "warmup_ratio": 0.1,
}
# What they are not accepted without, by GRPOConfig either
TOGETHER_WITH = {
    "log_completions_hub_repo": {"log_completions": True},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "per_device_train_batch_size": {"num_generations": 2},
}
# The first argument of every configuration, and what opens a process group
NOT_SET_HERE = {"output_dir", "ddp_backend"}

# One setting that is refused, and one that is accepted, of what is refused in part when a configuration is made
DIVERGENCE = {"divergence": "binary_tv"}
TOP_K = {"divergence": "topk_tv"}
IN_PART = {
    "loss_type": ({"loss_type": "cispo"}, {"loss_type": "dr_grpo"}),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.001}, {"router_aux_loss_coef": 0.0}),
    "optim": ({"optim": "adalomo"}, {"optim": "sgd"}),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, {"auto_find_batch_size": False}),
    "importance_sampling_level": (
        {"importance_sampling_level": "sequence", **DIVERGENCE},
        {"importance_sampling_level": "sequence"},
    ),
    "vllm_importance_sampling_mode": (
        {"vllm_importance_sampling_mode": "token_mask", **DIVERGENCE},
        {"vllm_importance_sampling_mode": "token_mask"},
    ),
    "vllm_importance_sampling_clip_min": (
        {"vllm_importance_sampling_clip_min": 0.5, **DIVERGENCE},
        {"vllm_importance_sampling_clip_min": 0.5},
    ),
    "vllm_importance_sampling_clip_max": (
        {"vllm_importance_sampling_clip_max": 2.0, **DIVERGENCE},
        {"vllm_importance_sampling_clip_max": 2.0},
    ),
    "vllm_importance_sampling_cap": (
        {"vllm_importance_sampling_cap": 2.0, **DIVERGENCE},
        {"vllm_importance_sampling_cap": 2.0},
    ),
    "generation_kwargs": (
        {"generation_kwargs": {"logprobs": 2}, "use_vllm": True, **DIVERGENCE},
        {"generation_kwargs": {"logprobs": 2}, "use_vllm": True},
    ),
    "use_transformers_continuous_batching": (
        {"use_transformers_continuous_batching": True, **TOP_K},
        {"use_transformers_continuous_batching": True, **DIVERGENCE},
    ),
    "use_transformers_paged": (
        {"use_transformers_paged": True, **TOP_K},
        {"use_transformers_paged": True, **DIVERGENCE},
    ),
}
# The others in that list are refused when the trainer is made: test_setup_checks.py, test_refusals.py
AT_THE_TRAINER = {"parallelism_config", "accelerator_config", "deepspeed", "fsdp", "fsdp_config"}


def another_value(name):
    """A valid value that is not the default."""
    default = DEFAULTS[name]
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1 if isinstance(default, int) else default / 2 + 0.05
    return "another"


def test_every_field_of_the_installed_trl_is_in_one_list():
    """A field that fails here is new: read what it does to the loss and to gradients, and put it where it belongs."""
    assert DEFAULTS.keys() - KNOWN == set()
    for one, other in combinations(LISTS, 2):
        assert not set(one) & set(other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() & (SAME | OTHER_MEANING.keys()) - NOT_SET_HERE))
def test_accepted_fields_are_what_grpo_makes_of_them(name, tmp_path):
    settings = {**TOGETHER_WITH.get(name, {}), name: another_value(name)}
    assert settings[name] != DEFAULTS[name]
    ours, grpos = (getattr(make_args(tmp_path, c, **settings), name) for c in (PROMAConfig, GRPOConfig))
    assert ours == grpos


@pytest.mark.parametrize("config_class,method", [(PROMAConfig, "PROMA"), (DPPOConfig, "DPPO")])
@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() & REFUSED.keys()))
def test_refused_fields_are_refused(name, config_class, method, tmp_path):
    value = another_value(name)
    assert value != DEFAULTS[name]
    message = f"`{name}={value!r}` is not available with {method}: {REFUSED[name]}. Leave it at its default"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_args(tmp_path, config_class, **{name: value})


def test_all_that_is_refused_in_part_is_tested():
    assert IN_PART.keys() | AT_THE_TRAINER == PARTLY_REFUSED.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() & IN_PART.keys()))
def test_fields_that_are_refused_in_part(name, tmp_path):
    refused, accepted = IN_PART[name]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make_args(tmp_path, **refused)
    make_args(tmp_path, **accepted)


@pytest.fixture
def newer_config(monkeypatch):
    """`PROMAConfig` as if `GRPOConfig` had two more fields than any known version."""
    new = [("brand_new_loss", str | None, None), ("brand_new_list", list, field(default_factory=list))]
    newer_grpo = make_dataclass("GRPOConfig", new, bases=(GRPOConfig,))
    monkeypatch.setattr(config, "GRPOConfig", newer_grpo)
    return make_dataclass("PROMAConfig", [], bases=(PROMAConfig, newer_grpo))


@pytest.mark.parametrize("settings", [{"brand_new_loss": "fancy"}, {"brand_new_list": [1]}])
def test_what_is_in_no_list_is_refused_when_it_is_set(settings, newer_config, tmp_path):
    ((name, value),) = settings.items()
    message = (
        rf"`{name}={re.escape(repr(value))}` is a setting of the installed TRL.*Leave it at its default.*report it"
    )
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, newer_config, **settings)


def test_what_is_in_no_list_may_keep_its_default(newer_config, tmp_path):
    args = make_args(tmp_path, newer_config, projection_sweeps=3)
    assert args.brand_new_loss is None and args.brand_new_list == []
