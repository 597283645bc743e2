"""What is refused before training, and what is said to have no effect."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DynamoBackend
from support.harness import make_args, make_model
from transformers.distributed import DistributedConfig

from proma_trl.trainer.setup_checks import check_ranks_agree, check_setup, settings_without_effect


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
