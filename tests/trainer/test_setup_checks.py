"""What is refused before training, and what is said to have no effect."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DynamoBackend
from datasets import Dataset, DatasetDict
from support.harness import TOKENIZER, make_args, make_model, make_trainer, vowel_reward
from transformers.distributed import DistributedConfig
from trl import GRPOConfig, GRPOTrainer

from proma_trl import DPPOConfig, DPPOTrainer, PROMAConfig, PROMATrainer
from proma_trl.trainer.setup_checks import (
    check_prompts,
    check_ranks_agree,
    check_setup,
    prompts_needed,
    settings_without_effect,
)


def setup(distributed_type=DistributedType.MULTI_GPU, deepspeed=None, **attributes):
    """What an accelerator says of itself."""
    state = SimpleNamespace(
        dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO),
        deepspeed_plugin=SimpleNamespace(
            deepspeed_config=deepspeed, zero_stage=(deepspeed or {}).get("zero_optimization", {}).get("stage")
        ),
    )
    defaults = {"parallelism_config": None, "gradient_state": SimpleNamespace(plugin_kwargs={}), "is_fsdp2": False}
    defaults["num_processes"] = 2
    return SimpleNamespace(distributed_type=distributed_type, state=state, **{**defaults, **attributes})


def zero(**settings):
    return setup(DistributedType.DEEPSPEED, {"zero_optimization": {"stage": 3}, **settings})


def zero1():
    return zero(zero_optimization={"stage": 1})


MODEL = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    "accelerator,num_gpus,message",
    [
        (setup(), 2, r"`torch.nn.DataParallel` on 2 GPUs.*--num_processes 2"),
        (setup(DistributedType.MEGATRON_LM), 1, r"Megatron-LM.*`recipes/accelerate`"),
        (setup(parallelism_config=ParallelismConfig(tp_size=2)), 1, r"tensor, context or sequence.*data parallelism"),
        (setup(DistributedType.FSDP), 1, r"FSDP version 1.*`fsdp_version: 2`"),
        (zero(zero_optimization={"zero_quantized_gradients": True}), 1, r"`zero_quantized_gradients`.*Leave"),
        (zero(zero_optimization={"zenflow": {"topk_ratio": 0.1}}), 1, r"`zenflow`.*Leave"),
        (zero(tensor_parallel={"autotp_size": 2}), 1, r"pipeline or tensor parallelism.*data parallelism"),
        (zero(pipeline={"stages": 2}), 1, r"pipeline or tensor parallelism.*data parallelism"),
        (zero(compile={"deepcompile": True}), 1, r"DeepCompile.*Leave `compile` out"),
    ],
)
def test_setups_that_cannot_work_are_refused(accelerator, num_gpus, message):
    with pytest.raises(ValueError, match=rf"{message}.*Or set `projection=\"none\"`"):
        check_setup(accelerator, num_gpus, MODEL)


@pytest.mark.parametrize("name", ["pp_size", "dp_replicate_size"])
def test_pipelines_and_replicas_at_loading_are_refused(name):
    model = make_model()
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    check_setup(setup(), 1, model)
    setattr(model.config.distributed_config, name, 2)  # not all versions take both
    with pytest.raises(ValueError, match="Set `fsdp_size` alone"):
        check_setup(setup(), 1, model)


@pytest.mark.parametrize(
    "accelerator", [setup(), zero(), setup(DistributedType.FSDP, is_fsdp2=True), setup(DistributedType.NO)]
)
def test_setups_that_work_are_not_refused(accelerator):
    check_setup(accelerator, 1, MODEL)


INTRA = {"intra_dim": 3, "projection": "none"}
MODEL = make_model()
BFLOAT16 = {"projection_accumulator_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "accelerator,kwargs,names",
    [
        (setup(), {}, []),
        (setup(), {"gradient_accumulation_steps": 1}, ["projection"]),
        (setup(), {"projection": "exact", "projection_sweeps": 3}, ["projection_sweeps"]),
        (setup(), {"projection_scope": "global"}, []),
        (setup(num_processes=1), {"projection_scope": "global"}, ["projection_scope"]),
        (zero(), BFLOAT16, []),
        (zero1(), BFLOAT16, ["projection_accumulator_dtype"]),
        (setup(), BFLOAT16, ["projection_accumulator_dtype"]),
        (zero(), BFLOAT16 | {"projection_scope": "global"}, ["projection_accumulator_dtype"]),
        (setup(), {"projection": "none"}, []),
        (
            setup(),
            {"projection": "none", "projection_bound": 1.0, "projection_memory_budget": 2.0},
            ["projection_bound", "projection_memory_budget"],
        ),
        (setup(), {"projection_strength": 0.0, "projection_scope": "global"}, ["projection_scope"]),
        (setup(), {"projection_bound": 0.0, "projection_sweeps": 1}, ["projection_sweeps"]),
        (setup(), {"projection": "none", "gradient_accumulation_steps": 1}, []),
        (zero(), INTRA | {"intra_target": "accumulated"} | BFLOAT16, []),
        (zero(), INTRA | BFLOAT16, ["projection_accumulator_dtype"]),
        (zero1(), INTRA | {"intra_target": "accumulated"} | BFLOAT16, ["projection_accumulator_dtype"]),
        (setup(), INTRA | {"projection_scope": "global"}, ["projection_scope"]),
    ],
)
def test_no_setting_is_silently_without_effect(accelerator, kwargs, names, tmp_path):
    messages = settings_without_effect(make_args(tmp_path, **kwargs), accelerator, MODEL)
    assert len(messages) == len(names)
    for name, message in zip(names, messages, strict=True):
        assert message.startswith(f"`{name}=") and "has no effect" in message


def test_intra_settings_without_effect_on_a_model(tmp_path):
    model, args = make_model(), make_args(tmp_path, **INTRA, intra_head=False)
    model.get_output_embeddings().weight.requires_grad_(False)
    (message,) = settings_without_effect(args, setup(), model)
    assert message == "`intra_head=False` has no effect: the LM head is not trained."
    for name, param in model.named_parameters():
        param.requires_grad_("norm" in name)
    (message,) = settings_without_effect(args, setup(), model)
    assert message.startswith("`intra_dim=3` has no effect on this model: none of its trainable parameters")


def test_ranks_that_differ_in_what_they_train(monkeypatch):
    """As they can with PEFT's adapters on experts, one of which is around the other."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, bias=False))
    names = ["0.weight", "0.bias", "1.weight"]
    accelerator = SimpleNamespace(num_processes=2, process_index=0)
    for other, message in (
        (names, None),
        (["0.bias", "0.weight", "1.weight"], "`0.weight` on rank 0 is `0.bias` on rank 1.*PYTHONHASHSEED=0"),
        (names[:2], "`1.weight` on rank 0 is `None` on rank 1"),
    ):
        monkeypatch.setattr("proma_trl.trainer.setup_checks.gather_object", lambda own, other=other: [*own, other])
        if message is None:
            check_ranks_agree(accelerator, model)
        else:
            with pytest.raises(ValueError, match=message):
                check_ranks_agree(accelerator, model)


REINFORCE = {"projection": "none"}
BATCHES = [
    {},
    {"gradient_accumulation_steps": 16, "per_device_train_batch_size": 8, "num_generations": 8},
    {"gradient_accumulation_steps": 1, "steps_per_generation": 4, "num_generations": 2},
    {"gradient_accumulation_steps": 2, "generation_batch_size": 24},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 2},
    {"num_iterations": 3, "max_steps": 7},
    {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True},
]


def sampled(args, num_prompts):
    """How many sequences TRL samples in an epoch."""
    trainer = SimpleNamespace(
        args=args, num_generations=args.num_generations, num_iterations=args.num_iterations, shuffle_dataset=True
    )
    return len(GRPOTrainer._get_train_sampler(trainer, [0] * num_prompts))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("settings", BATCHES)
def test_prompts_that_a_training_needs(settings, ranks, tmp_path):
    args = make_args(tmp_path, **settings)
    args.generation_batch_size *= ranks  # as with that world size
    needed = prompts_needed(args, ranks)
    assert sampled(args, needed) > sampled(args, needed - 1) == 0
    check_prompts(args, needed, ranks)
    for few in range(1, needed):
        with pytest.raises(ValueError, match=rf"^{few} prompts? .* Give {needed} prompts or more, or set `") as error:
            check_prompts(args, few, ranks)
        # The advice suffices
        advice = {name: int(value) for name, value in re.findall(r"`(\w+)=(\d+)`", str(error.value))}
        smaller = copy.copy(args)
        for name, value in advice.items():
            setattr(smaller, name, value)
        if args.steps_per_generation == args.gradient_accumulation_steps:  # the former follows the latter
            smaller.steps_per_generation = smaller.gradient_accumulation_steps
        batch = ranks * smaller.per_device_train_batch_size * smaller.steps_per_generation
        assert batch % smaller.num_generations == 0
        check_prompts(smaller, few, ranks)


def test_the_advice_leaves_something_to_project(tmp_path):
    args = make_args(tmp_path, gradient_accumulation_steps=16, per_device_train_batch_size=8, num_generations=8)
    with pytest.raises(ValueError, match=r"set `gradient_accumulation_steps=5`"):
        check_prompts(args, 5, 1)
    with pytest.raises(ValueError, match=r"set `gradient_accumulation_steps=4` and `per_device_train_batch_size=2`"):
        check_prompts(args, 1, 1)


def test_more_ranks_than_a_prompt_has_completions(tmp_path):
    with pytest.raises(ValueError, match=r"3 microbatches x 4 sequences x 16 ranks / 4 completions.*use fewer ranks"):
        check_prompts(make_args(tmp_path), 3, 16)


def test_no_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"no prompts to train on"):
        check_prompts(make_args(tmp_path), 0, 1)


@pytest.mark.parametrize("length,steps", [({"max_steps": -1, "num_train_epochs": 1}, 1), ({"max_steps": 2}, 2)])
@pytest.mark.parametrize(
    "trainer_class,config_class,method",
    [(PROMATrainer, PROMAConfig, {}), (PROMATrainer, PROMAConfig, REINFORCE), (DPPOTrainer, DPPOConfig, {})],
)
def test_too_few_prompts_are_said_at_construction_and_refused(
    trainer_class, config_class, method, length, steps, tmp_path
):
    kwargs = {"trainer_class": trainer_class, "config_class": config_class, **method, **length}
    with pytest.warns(UserWarning, match=r"2 prompts are too few.*3 prompts at a time"):
        trainer = make_trainer(tmp_path, prompts=2, **kwargs)
    with pytest.raises(ValueError, match=r"2 prompts are too few.*3 prompts at a time"):
        trainer.train()
    assert make_trainer(tmp_path, prompts=3, **kwargs).train().global_step == steps


@pytest.mark.parametrize("count,steps", [(2, 0), (3, 2)])
def test_a_stream_that_trains_nothing_is_an_error(count, steps, tmp_path):
    def trainer(trainer_class, config_class):
        return trainer_class(
            model=make_model(),
            reward_funcs=vowel_reward,
            args=make_args(tmp_path, config_class, max_steps=2),
            train_dataset=Dataset.from_dict({"prompt": ["ab"] * count}).to_iterable_dataset(),
            processing_class=TOKENIZER,
        )

    ours = trainer(PROMATrainer, PROMAConfig)
    if steps:
        assert ours.train().global_step == 2
        return
    with pytest.raises(ValueError, match=r"Nothing was trained.*`max_steps=2`.*3 prompts at a time"):
        ours.train()
    assert trainer(GRPOTrainer, GRPOConfig).train().global_step == 0


def test_what_is_no_dataset_is_trls_to_refuse(tmp_path):
    splits = DatasetDict(train=Dataset.from_dict({"prompt": ["ab"] * 64}))
    with pytest.raises(TypeError, match=r"DatasetDict"):
        PROMATrainer(make_model(), vowel_reward, make_args(tmp_path), splits, processing_class=TOKENIZER)
