"""Checks of a training: setups that the projection does not work with, too few prompts, settings without effect."""

from collections.abc import Iterator
from itertools import zip_longest

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, gather_object
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from trl import GRPOConfig

from ..backends import is_deepspeed
from ..sequence_grads import head_weights, plan_linear_layers
from .config import REINFORCE_SETTINGS, PROMAConfig

# From here on the projection has earlier microbatches to act on in most of a step
_FEW_MICROBATCHES = 4


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


def prompts_needed(args: GRPOConfig, num_processes: int) -> int:
    """
    Returns the number of prompts that completions are generated for at a time, on all ranks together. TRL leaves out
    what is left of an epoch's prompts if it is fewer.

    Args:
        args ([`~trl.GRPOConfig`]): The configuration.
        num_processes (`int`): Number of ranks.
    """
    return args.per_device_train_batch_size * args.steps_per_generation * num_processes // args.num_generations


def check_prompts(args: GRPOConfig, num_prompts: int, num_processes: int) -> None:
    """
    Check that there are enough prompts for training to take a step.

    Args:
        args ([`~trl.GRPOConfig`]): The configuration.
        num_prompts (`int`): Number of prompts to train on.
        num_processes (`int`): Number of ranks.

    Raises:
        ValueError: If there are not, with the number that it takes and what to set.
    """
    problem = too_few_prompts(args, num_prompts, num_processes)
    if problem is not None:
        raise ValueError(problem)


def too_few_prompts(args: GRPOConfig, num_prompts: int, num_processes: int) -> str | None:
    """Returns what [`check_prompts`] raises, or `None`."""
    needed = prompts_needed(args, num_processes)
    if num_prompts >= needed:
        return None
    if num_prompts == 0:
        return "There are no prompts to train on: `train_dataset` is empty."
    k, completions = args.per_device_train_batch_size, args.num_generations
    ranks = f" x {num_processes} ranks" if num_processes > 1 else ""
    follows_step = args.steps_per_generation == args.gradient_accumulation_steps
    count = "gradient_accumulation_steps" if follows_step else "steps_per_generation"
    smaller = _smaller_batch(args, num_prompts, num_processes)
    way_out = f"set {smaller}" if smaller else "use fewer ranks"
    return (
        f"{num_prompts} prompt{'s are' if num_prompts > 1 else ' is'} too few: completions are generated for {needed} "
        f"prompts at a time ({args.steps_per_generation} microbatches x {k} sequences{ranks} / {completions} "
        f"completions a prompt), so that training would take no step. Give {needed} prompts or more, or {way_out}. "
        f"A smaller `{count}` ({args.steps_per_generation}) or `per_device_train_batch_size` ({k}) and a larger "
        f"`num_generations` ({completions}) need fewer prompts."
    )


def _smaller_batch(args: GRPOConfig, num_prompts: int, num_processes: int) -> str:
    """Settings with which the prompts suffice, and with enough microbatches if there are such settings."""
    sequences = num_prompts * args.num_generations
    best: tuple[int, int] = (0, 0)
    k = args.per_device_train_batch_size
    while k > 0 and best[0] < min(_FEW_MICROBATCHES, args.gradient_accumulation_steps):
        most = min(sequences // (k * num_processes), args.gradient_accumulation_steps)
        fits = (m for m in range(most, 0, -1) if m * k * num_processes % args.num_generations == 0)
        best = max(best, (next(fits, 0), k))
        k //= 2
    microbatches, k = best
    if microbatches == 0:
        return ""
    settings = {}
    if microbatches != args.gradient_accumulation_steps:
        settings["gradient_accumulation_steps"] = microbatches
    if k != args.per_device_train_batch_size:
        settings["per_device_train_batch_size"] = k
    if args.steps_per_generation != args.gradient_accumulation_steps:
        settings["steps_per_generation"] = microbatches
    return " and ".join(f"`{name}={value}`" for name, value in settings.items())


class RefuseNoSteps(TrainerCallback):
    """
    Refuses a training that ends before its first optimizer step, as where a streamed dataset has too few prompts.

    Raises:
        ValueError: When training ends.
    """

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            raise ValueError(
                "Nothing was trained: training ended before its first optimizer step "
                f"(`num_train_epochs={args.num_train_epochs:g}`, `max_steps={args.max_steps}`). Completions are "
                f"generated for {prompts_needed(args, args.world_size)} prompts at a time, and a dataset with fewer "
                "gives none: give more prompts, or set a smaller `gradient_accumulation_steps` (or "
                "`steps_per_generation`) or `per_device_train_batch_size`."
            )


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
