"""Checks before training: setups that the projection does not work with, and settings without effect."""

from collections.abc import Iterator
from itertools import zip_longest

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, gather_object
from peft import PeftModel
from torch import nn

from ..backends import is_deepspeed
from ..sequence_grads import head_weights, plan_linear_layers
from .config import REINFORCE_SETTINGS, PROMAConfig


def settings_without_effect(args: PROMAConfig, accelerator: Accelerator, model: nn.Module) -> list[str]:
    """
    Returns a sentence for each setting of the update rule that was set and has no effect in this setup.

    Args:
        args ([`PROMAConfig`]): The configuration.
        accelerator (`Accelerator`): What will prepare the model.
        model (`nn.Module`): What will be trained.
    """
    messages, rule = args.settings_without_effect(), args.update_rule()
    intra = args.intra_settings()
    if intra.removes and not plan_linear_layers(model, intra.head):
        messages.append(
            f"`intra_dim={intra.dim}` has no effect on this model: none of its trainable parameters is the weight of "
            "a linear layer whose inputs are the microbatch's tokens."
        )
    elif intra.removes and not intra.head and not any(weight.requires_grad for weight in head_weights(model)):
        messages.append("`intra_head=False` has no effect: the LM head is not trained.")
    if args.adapter_dtype == "float32" and not (is_quantized(model) and has_adapters(model)):
        messages.append(
            '`adapter_dtype="float32"` has no effect: it is for the adapters of a model that is quantized to 4 or 8 '
            "bits. Other parameters keep the dtype in which they were loaded."
        )
    needs_accumulated = rule.needs_accumulated or (intra.removes and intra.target == "accumulated")
    if rule.is_plain and not needs_accumulated:
        return messages
    if args.projection_scope == "global" and accelerator.num_processes == 1:
        messages.append('`projection_scope="global"` has no effect with one process: there are no other ranks.')
    keeps_sums = (
        needs_accumulated
        and args.projection_scope == "local"
        and is_deepspeed(accelerator)
        and accelerator.state.deepspeed_plugin.zero_stage >= 2
    )
    if "projection_accumulator_dtype" in args.changed_settings() and not keeps_sums:
        messages.append(
            f"`projection_accumulator_dtype={args.projection_accumulator_dtype!r}` has no effect here: it is for "
            'DeepSpeed ZeRO-2 and ZeRO-3 with `projection_scope="local"`. Elsewhere, gradients accumulate where the '
            "backend keeps them."
        )
    return messages


def is_quantized(model: nn.Module) -> bool:
    """Whether TRL takes a model for one that is quantized, and casts its adapters to bfloat16."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is PEFT's, or holds adapters that PEFT has put in."""
    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)


def check_setup(accelerator: Accelerator, num_gpus: int, model: nn.Module) -> None:
    """
    Check that gradients are made and reduced as the projection needs it.

    Args:
        accelerator (`Accelerator`): What will prepare the model.
        num_gpus (`int`): GPUs of this one process; more than one mean `torch.nn.DataParallel`.
        model (`nn.Module`): What will be trained.

    Raises:
        ValueError: If not, with the way out.
    """
    for problem, way_out in _problems(accelerator, num_gpus, model):
        raise ValueError(
            f"PROMA's projection does not work with {problem}. {way_out} Or set {REINFORCE_SETTINGS}, which is "
            "REINFORCE."
        )


def check_ranks_agree(accelerator: Accelerator, model: nn.Module) -> None:
    """
    Check that all ranks train the same parameters in the same order, in which gradients are averaged. All ranks call
    this.

    Args:
        accelerator (`Accelerator`): What will prepare the model.
        model (`nn.Module`): What will be trained.

    Raises:
        ValueError: If not, with the first name that differs.
    """
    if accelerator.num_processes == 1:
        return
    own = [name for name, param in model.named_parameters() if param.requires_grad]
    for rank, names in enumerate(gather_object([own])):
        if names != own:
            here, there = next(pair for pair in zip_longest(own, names) if pair[0] != pair[1])
            raise ValueError(
                f"Ranks differ in what they train, or in its order: `{here}` on rank {accelerator.process_index} is "
                f"`{there}` on rank {rank}, and their gradients would be averaged. Where PEFT puts several adapters "
                "on a mixture's experts, their order depends on the process: launch with `PYTHONHASHSEED=0`."
            )


def _problems(accelerator: Accelerator, num_gpus: int, model: nn.Module) -> Iterator[tuple[str, str]]:
    data_parallel = "Use data parallelism: DDP, DeepSpeed ZeRO or FSDP2, as in `recipes/accelerate`."
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        yield (
            "a compiled model, whose layers bypass the hooks that collect sequence gradients",
            "Launch without `--dynamo_backend` (unset `ACCELERATE_DYNAMO_BACKEND`).",
        )
    if num_gpus > 1:
        yield (
            f"`torch.nn.DataParallel` on {num_gpus} GPUs",
            f"Launch one process a GPU (`accelerate launch --num_processes {num_gpus}`), or use one GPU "
            "(`CUDA_VISIBLE_DEVICES=0`).",
        )
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        yield "Megatron-LM, whose engine runs the backward pass by itself", data_parallel
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        yield "tensor, context or sequence parallelism, which spread a sequence's gradient over ranks", data_parallel
    loaded = getattr(getattr(model, "config", None), "distributed_config", None)
    # Replicas are not in all versions of transformers
    if loaded is not None and any((getattr(loaded, n, None) or 1) > 1 for n in ("pp_size", "dp_replicate_size")):
        yield (
            "transformers' `DistributedConfig` of several pipeline stages or replicas of shards, which reduce "
            "gradients within an accumulation",
            "Set `fsdp_size` alone.",
        )
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        yield (
            "`sync_each_batch`, which averages over ranks what they have yet to project",
            "Leave it out of `accelerator_config`'s `gradient_accumulation_kwargs`.",
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "FSDP version 1, which flattens parameters", "Set `fsdp_version: 2` in Accelerate's configuration."
    if is_deepspeed(accelerator):
        yield from _deepspeed_problems(accelerator.state.deepspeed_plugin.deepspeed_config, data_parallel)


def _deepspeed_problems(config: dict, data_parallel: str) -> Iterator[tuple[str, str]]:
    zero = config.get("zero_optimization", {})
    for name in ("zero_quantized_gradients", "zenflow"):
        if zero.get(name):
            yield (
                f"DeepSpeed's `{name}`, under which gradients are not what the backward pass emits",
                f"Leave `zero_optimization.{name}` out of DeepSpeed's configuration.",
            )
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1 or "pipeline" in config:
        yield "DeepSpeed's pipeline or tensor parallelism", data_parallel
    if config.get("compile", {}).get("deepcompile"):
        yield (
            "DeepCompile, whose graphs bypass the hooks that collect sequence gradients",
            "Leave `compile` out of DeepSpeed's configuration.",
        )
