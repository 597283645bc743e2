"""
Everything that the package uses of TRL beyond its public interface, what differs in it between TRL's versions, and the
function that checks it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import trl
import trl.trainer.grpo_trainer as grpo_trainer
import trl.trainer.utils as trl_utils
from packaging.version import Version
from peft import PeftModel
from transformers import TrainingArguments
from transformers.utils import is_triton_available
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from ..devices import runs_triton

# TRL 1.15 has its fused head in Triton alone, and gives it the scored positions only. Newer ones also have it in
# torch, and give it all positions where `_use_triton` says so
_IS_1_15 = Version(trl.__version__) < Version("1.16")
_NEEDS_TRITON = (
    f"TRL {trl.__version__} computes log-probabilities in Triton alone, which needs a GPU, so that neither its "
    "`GRPOTrainer` nor proma-trl's trainers work {where}. Install a newer TRL: `pip install 'trl==1.16.*'`."
)
if _IS_1_15 and not is_triton_available():
    raise ImportError(_NEEDS_TRITON.format(where="where Triton is not installed"))

import trl.kernels.chunked_logprob as chunked_logprob  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402

# What decides whether the fused head is given scored positions only, by `_use_triton`
_POSITIONS = SimpleNamespace(_use_triton=lambda device: True) if _IS_1_15 else trl_utils
# The name of the setting that transformers does not warn of. Versions before 5.23 have only the former name, which TRL
# still sets by default
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
# What a model returns for each position when its fused head runs
_FUSED_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# Methods of `GRPOTrainer` that are overridden, called or replaced for a while, with their arguments
_METHODS = {
    "__init__": "self model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes "
    "callbacks optimizers quantization_config peft_config tools rollout_func environment_factory",
    "_compute_loss": "self model inputs",
    "_generate": "self prompts",
    "_generate_and_score_completions": "self inputs",
    "_generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    "_load_optimizer_and_scheduler": "self checkpoint",
    "_prepare_inputs": "self generation_batch",
    "_save_checkpoint": "self model trial",
    "create_model_card": "self model_name dataset_name tags",
    "get_train_dataloader": "self",
    "get_off_policy_mask": "advantages per_token_logps sampling_per_token_logps mask off_policy_threshold",
    "log": "self logs start_time",
}
# Its first five arguments are `self model input_ids attention_mask logits_to_keep`; others are passed on as they come
SCORING = "_get_per_token_logps_and_entropies"
_SCORING_ARGUMENTS = "self model input_ids attention_mask logits_to_keep"
_CLASS_ATTRIBUTES = (SCORING, "_name", "_paper", "_tag_names")
_ATTRIBUTES = (
    "_buffered_inputs",
    "_metrics",
    "_step",
    "_tokenizer",
    "aux_loss_enabled",
    "continuous_batching_config",
    "epsilon_high",
    "epsilon_low",
    "off_policy_mask_threshold",
    "rollout_func",
    "temperature",
    "use_transformers_continuous_batching",
    "use_vllm",
    "vllm_generation",
    "vllm_importance_sampling_correction",
    "vllm_mode",
)
# Functions that its methods call
_FUNCTIONS = ("shuffle_sequence_dict", "split_pixel_values_by_grid", "unsplit_pixel_values_by_grid")
_HEAD_NAMES = ("_ChunkedLogProbFunction", "maybe_gather_lm_head_ctx")
_KERNEL_NAMES = ("_BLOCK_SIZE",)
if not _IS_1_15:
    _HEAD_NAMES, _KERNEL_NAMES = (*_HEAD_NAMES, "_use_triton"), (*_KERNEL_NAMES, "_use_triton")
_HEAD_ARGUMENTS = "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
_HEAD_KERNEL_ARGUMENTS = (
    "mm_ptr mm_stride targets_ptr log_z_ptr entropy_ptr grad_logprobs_ptr grad_entropy_ptr vocab_start n_cols "
    "logit_scale softcap inv_t HAS_SOFTCAP HAS_LOGPROB_GRAD HAS_ENTROPY_GRAD BLOCK_SIZE"
)
_HEAD_TRANSFORM = {"logit_scale", "softcap", "inv_t", "HAS_SOFTCAP"}


def check_trl(device: torch.device) -> None:
    """
    Check that TRL has, as this package knows it, everything that is used of its insides.

    Args:
        device (`torch.device`): Where the model is trained.

    Raises:
        RuntimeError: If something has moved, with its name, or if this TRL does not work on the device.
    """
    if _IS_1_15 and not runs_triton(device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(_NEEDS_TRITON.format(where=f"on {device.type!r}"))
    # The head's function is the same on every device that has it
    moved = [*_moved_in_trainer(), *_moved_in_head(device if _IS_1_15 else torch.device("cpu"))]
    if moved:
        raise RuntimeError(
            f"The installed TRL differs from the versions that proma-trl works with in: {', '.join(moved)}. Gradients "
            "could be wrong. Install a TRL version within the bounds of proma-trl's requirements."
        )


def _moved_in_trainer() -> Iterator[str]:
    for name, arguments in _METHODS.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None or list(inspect.signature(method).parameters) != arguments.split():
            yield f"GRPOTrainer.{name}"
    yield from (f"GRPOTrainer.{name}" for name in _CLASS_ATTRIBUTES if not hasattr(GRPOTrainer, name))
    used = {name for value in vars(GRPOTrainer).values() for name in getattr(_code(value), "co_names", ())}
    yield from (f"GRPOTrainer.{name}" for name in _ATTRIBUTES if name not in used)
    yield from (f"trl.trainer.grpo_trainer.{name}" for name in _FUNCTIONS if name not in used)
    scoring = getattr(GRPOTrainer, SCORING, None)
    if scoring is not None and list(inspect.signature(scoring).parameters)[:5] != _SCORING_ARGUMENTS.split():
        yield f"GRPOTrainer.{SCORING}"


def _code(method: Any) -> Any:
    return getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)


def _moved_in_head(device: torch.device) -> Iterator[str]:
    missing = [name for name in _HEAD_NAMES if not hasattr(trl_utils, name)]
    yield from (f"trl.trainer.utils.{name}" for name in missing)
    kernel = getattr(chunked_logprob, "_backward_kernel", None)  # a function without Triton, and made of one with it
    kernel = getattr(kernel, "fn", kernel)
    if kernel is None or list(inspect.signature(kernel).parameters) != _HEAD_KERNEL_ARGUMENTS.split():
        yield "trl.kernels.chunked_logprob._backward_kernel"
    missing = [name for name in _KERNEL_NAMES if not hasattr(chunked_logprob, name)]
    yield from (f"trl.kernels.chunked_logprob.{name}" for name in missing)
    if list(inspect.signature(ChunkedLogProbFunction.forward).parameters) != _HEAD_ARGUMENTS.split():
        yield "ChunkedLogProbFunction.forward"
        return
    hidden, weight = torch.ones(2, 3, device=device, requires_grad=True), torch.eye(4, 3, device=device)
    targets = torch.tensor([0, 3], device=device)
    try:
        log_probs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.5, 4)
        saved = kernel_state(log_probs.grad_fn)
        found = (saved.hidden, saved.weight, saved.targets, saved.log_z)
        expected = (hidden, weight, targets, (2 * hidden @ weight.T).logsumexp(-1))
        same = all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True))
    except Exception:  # whatever it is that went wrong, the function is another one
        same = False
    if not same or saved.bias is not None or saved.transform.keys() != _HEAD_TRANSFORM:
        yield "what ChunkedLogProbFunction saves for its backward pass"


@dataclass(frozen=True)
class KernelState:
    """
    What TRL's fused head keeps for its backward pass, for N positions.

    Attributes:
        hidden (`(N, H)`), weight (`(V, H)`), bias (`(V,)` or `None`): What the head multiplies.
        targets (`(N,)`): Sampled tokens.
        log_z (`(N,)`): Log of the sum of exponentiated logits.
        compute_dtype (`torch.dtype`): Dtype of the products.
        transform (`dict`): `logit_scale`, `softcap`, `inv_t` and `HAS_SOFTCAP`: from products to logits.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    log_z: torch.Tensor
    compute_dtype: torch.dtype
    transform: dict[str, Any]


def kernel_forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
    """The forward pass of TRL's fused head, within another function's, for [`kernel_state`] to read."""
    return ChunkedLogProbFunction.forward(ctx, *arguments)


def kernel_state(ctx: Any) -> KernelState:
    """What a forward pass of TRL's fused head has kept."""
    hidden, weight, bias, targets, log_z, _ = ctx.saved_tensors
    return KernelState(hidden, weight, bias, targets, log_z, ctx.compute_dtype, ctx.kernel_args)


def logits_to_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_z: torch.Tensor,
    grad_logprobs: torch.Tensor,
    first: int,
    transform: dict[str, Any],
) -> bool:
    """
    Overwrite logits with the gradients of the head's products, by TRL's kernel for it.

    Args:
        logits (`(N, n)`): The head's products, for the tokens from `first` on of the vocabulary.
        targets (`(N,)`), log_z (`(N,)`), transform (`dict`): See [`KernelState`].
        grad_logprobs (`(N,)`): Gradient of the log-probabilities.
        first (`int`): The first token.

    Returns:
        `bool`: Whether it was done: there is a kernel where there is Triton.
    """
    if not _has_kernel(logits.device):
        return False
    size, length = chunked_logprob._BLOCK_SIZE, logits.shape[1]
    if logits.numel():
        chunked_logprob._backward_kernel[(len(logits), -(-length // size))](
            logits,
            logits.stride(0),
            targets,
            log_z,
            log_z,  # in the place of the entropy, which has no gradient
            grad_logprobs,
            log_z,
            first,
            length,
            HAS_LOGPROB_GRAD=True,
            HAS_ENTROPY_GRAD=False,
            BLOCK_SIZE=size,
            **transform,
        )
    return True


def _has_kernel(device: torch.device) -> bool:
    return runs_triton(device) if _IS_1_15 else chunked_logprob._use_triton(device)


def gathered_head(weight: torch.Tensor, bias: torch.Tensor | None) -> AbstractContextManager:
    """Within the context, ZeRO-3's shards of the head are whole: it doesn't run as a module, which would see to it."""
    return trl_utils.maybe_gather_lm_head_ctx(weight, bias)


@contextmanager
def replaced_kernel(kernel: Any) -> Iterator[Any]:
    """Within the context, the fused head of TRL's models calls `kernel.apply`. Yields what it calls otherwise."""
    with (
        replaced(trl_utils, "_ChunkedLogProbFunction", kernel) as original,
        # On a GPU, TRL would pass scored positions only, and which sequence they belong to would be lost
        replaced(_POSITIONS, "_use_triton", lambda device: False),
    ):
        yield original


@contextmanager
def observed_head(read: Callable[..., None]) -> Iterator[None]:
    """Within the context, `read` is called with what the fused head of TRL's models returns, and its arguments."""

    class Head:
        @staticmethod
        def apply(*arguments: Any) -> tuple[torch.Tensor | None, ...]:
            outputs = original.apply(*arguments)
            read(outputs, *arguments)
            return outputs

    with replaced(trl_utils, "_ChunkedLogProbFunction", Head) as original:
        yield


def head_is_compact(device: torch.device) -> bool:
    """Whether the fused head is given unmasked positions only."""
    return _POSITIONS._use_triton(device)


def prepare_head(model: torch.nn.Module) -> None:
    """
    Let the fused head that TRL has put into a model be given all positions, for [`replaced_kernel`].

    Args:
        model (`torch.nn.Module`): The model, or PEFT's around it.
    """
    if not _IS_1_15:
        return
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    fused = model.forward

    @functools.wraps(fused.__func__)
    def forward(self, *args, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head or labels is None or head_is_compact(labels.device):
            return fused(*args, labels=labels, fused_lm_head=fused_lm_head, **kwargs)
        # Each position has a label, and so is scored. The trainer makes its loss of the log-probabilities
        outputs = fused(*args, labels=labels.clamp(min=0), fused_lm_head=True, **kwargs)
        unscored = labels[:, 1:] == -100
        for name in _FUSED_OUTPUTS:
            if outputs.get(name) is not None:
                outputs[name] = outputs[name].masked_fill(unscored, 0)
        return outputs

    model.forward = MethodType(forward, model)


def unwrapped_for_generation(trainer: GRPOTrainer) -> AbstractContextManager:
    """Within the context, the trainer's model is one that can generate: whole, and without checkpointing."""
    # TRL 1.15 knows no settings of checkpointing, and switches it on again with the default ones
    settings = {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs}
    return unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        **({} if _IS_1_15 else settings),
    )


def split_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """What TRL's loss takes, with what belongs to images in lists, an entry for each sequence."""
    return grpo_trainer.split_pixel_values_by_grid(inputs)


def join_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `split_images`."""
    return grpo_trainer.unsplit_pixel_values_by_grid(inputs)


def rollouts_in_order() -> AbstractContextManager:
    """Within the context, a rollout's sequences are split into microbatches in the order of their prompts."""
    return replaced(grpo_trainer, "shuffle_sequence_dict", lambda rollout: rollout)


@contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[Any]:
    """Within the context, an object has another attribute than its own or its class's. Yields the one it has."""
    is_own, original = name in vars(instance), getattr(instance, name)
    setattr(instance, name, value)
    try:
        yield original
    finally:
        if is_own:
            setattr(instance, name, original)
        else:
            delattr(instance, name)


@contextmanager
def recorded(instance: Any, name: str) -> Iterator[dict[str, Any]]:
    """Within the context, what a method returns is kept as `"result"`."""
    method, results = getattr(instance, name), {}

    def recording(*args: Any, **kwargs: Any) -> Any:
        results["result"] = method(*args, **kwargs)
        return results["result"]

    with replaced(instance, name, recording):
        yield results
