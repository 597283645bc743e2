"""What the benchmarks share: models, inputs, timed and profiled steps, options, and the files they write."""

import argparse
import cProfile
import json
import pstats
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import LoraConfig
from shapes import SHAPES, Shape
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

import proma_trl
import proma_trl.sequence_grads.plan
from proma_trl import DPPOConfig, DPPOTrainer, PROMAConfig, PROMATrainer
from proma_trl.trainer.trl_internals import CHECKPOINTING

# Settings of trainers that neither log nor save
QUIET = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}

# As in recipes/gsm8k.py
ALGORITHMS = ("proma", "proma_intra", "proma_both")
# What they are measured beside, and the methods that project nothing
REFERENCE, REINFORCE, DPPO = "grpo", "reinforce", "dppo"

T = TypeVar("T")


class _ModelAction(argparse.Action):
    """`--model` sets the sizes that have options of their own, so that a later option can still change one."""

    def __call__(self, parser, namespace, values, option_string=None):
        shape = SHAPES[values]
        namespace.model = values
        namespace.hidden, namespace.layers, namespace.vocabulary = shape.hidden, shape.layers, shape.vocabulary


def model_shape(arguments: argparse.Namespace) -> Shape:
    """The sizes of the model that the options ask for."""
    if arguments.model is not None:
        return replace(SHAPES[arguments.model], layers=arguments.layers, vocabulary=arguments.vocabulary)
    heads = arguments.hidden // 64
    return Shape(
        hidden=arguments.hidden,
        layers=arguments.layers,
        intermediate=3 * arguments.hidden,
        heads=heads,
        kv_heads=heads // 2 if heads % 2 == 0 else heads,
        head_size=64,
        vocabulary=arguments.vocabulary,
        tied=True,
    )


def make_parser(description: str, length: Callable[[str], Any] = int, **defaults: Any) -> argparse.ArgumentParser:
    """
    The options that benchmarks of whole steps share, with other `defaults` where these are given. `length` reads one
    of `--lengths`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        choices=SHAPES,
        action=_ModelAction,
        help="sizes of a Qwen3; --layers and --vocabulary after it count",
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--lengths", type=length, nargs="+", default=[128, 256, 512], help="tokens per sequence, T")
    parser.add_argument("--prompt", type=float, default=0.5, help="the prompt's part of the tokens")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per microbatch, k")
    parser.add_argument("--microbatches", type=int, default=4, help="microbatches per optimizer step")
    parser.add_argument(
        "--algorithm",
        nargs="+",
        default=["proma"],
        choices=(*ALGORITHMS, REINFORCE, DPPO),
        help="what is measured beside GRPO",
    )
    parser.add_argument("--projection", default="iterative", choices=["iterative", "exact", "none"])
    parser.add_argument("--intra-dim", type=int, default=10, help="dimension of Intra-PROMA's subspaces")
    parser.add_argument("--budget", type=float, default=PROMAConfig.projection_memory_budget, help="GiB")
    parser.add_argument(
        "--lora", type=int, help="rank of LoRA adapters on all linear layers; all parameters without it"
    )
    parser.add_argument(
        "--experts", type=int, default=0, help="experts of each layer's mixture, of which a token meets 2"
    )
    parser.add_argument("--general", action="store_true", help="run experts again one sequence at a time")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.set_defaults(**defaults)
    return parser


def method_settings(arguments: argparse.Namespace, algorithm: str) -> dict[str, Any]:
    """The settings of `PROMAConfig` that make an algorithm what the options say of it."""
    if algorithm in (REINFORCE, DPPO):
        return {"projection": "none", "intra_dim": 0}
    return {
        "projection": "none" if algorithm == "proma_intra" else arguments.projection,
        "projection_memory_budget": arguments.budget,
        "intra_dim": 0 if algorithm == "proma" else arguments.intra_dim,
    }


def trainer_classes(algorithm: str) -> tuple[type[GRPOTrainer], type[GRPOConfig]]:
    """The classes of an algorithm's trainer and configuration."""
    if algorithm == REFERENCE:
        return GRPOTrainer, GRPOConfig
    return (DPPOTrainer, DPPOConfig) if algorithm == DPPO else (PROMATrainer, PROMAConfig)


def make_trainer(
    trainer_class: type[GRPOTrainer],
    config_class: type[GRPOConfig],
    arguments: argparse.Namespace,
    length: int,
    folder: str,
    reward_func: Callable[..., list[float]] | None = None,
    rollout_func: Callable[..., dict[str, list]] | None = None,
    **settings: Any,
) -> GRPOTrainer:
    """A trainer of a random Qwen3, dense or a mixture, for `train()`; without a `reward_func`, rewards are 0."""
    if arguments.general:
        proma_trl.sequence_grads.plan.is_experts = lambda module: False
    vocabulary = {f"token{i}": i for i in range(8)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="token2")),
        pad_token="token0",
        eos_token="token1",
        unk_token="token2",
    )
    torch.manual_seed(0)
    shape = model_shape(arguments)
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "tie_word_embeddings": shape.tied,
    }
    if arguments.experts:
        experts = {"num_experts": arguments.experts, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, moe_intermediate_size=shape.intermediate // 2))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    args = config_class(
        folder,
        per_device_train_batch_size=arguments.sequences,
        gradient_accumulation_steps=arguments.microbatches,
        num_generations=arguments.sequences,
        max_completion_length=length,
        bf16=arguments.bf16,
        use_cpu=arguments.device == "cpu",
        learning_rate=1e-5,
        report_to="none",
        **{CHECKPOINTING: arguments.checkpointing},
        **settings,
    )
    return trainer_class(
        model,
        reward_func or (lambda completions, **_: [0.0] * len(completions)),
        args,
        Dataset.from_dict({"prompt": ["token3"] * 8}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=arguments.lora, target_modules="all-linear") if arguments.lora else None,
        rollout_func=rollout_func,
    )


def make_prepared_trainer(
    trainer_class: type[GRPOTrainer],
    config_class: type[GRPOConfig],
    arguments: argparse.Namespace,
    length: int,
    **settings: Any,
) -> GRPOTrainer:
    """The same, ready for `step` instead."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(trainer_class, config_class, arguments, length, folder, **settings)
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = arguments.microbatches
    if arguments.checkpointing:  # which `train()` would turn on
        enable = getattr(trainer.model, f"{CHECKPOINTING}_enable")
        enable(getattr(trainer.args, f"{CHECKPOINTING}_kwargs"))
    trainer.model.train()
    return trainer


def make_algorithm_trainer(arguments: argparse.Namespace, length: int, algorithm: str) -> GRPOTrainer:
    """A trainer of an algorithm, ready for `step`."""
    settings = {} if algorithm == REFERENCE else method_settings(arguments, algorithm)
    return make_prepared_trainer(*trainer_classes(algorithm), arguments, length, **settings)


def make_inputs(arguments: argparse.Namespace, length: int, seed: int) -> dict[str, torch.Tensor]:
    """A microbatch as TRL's loss takes it: a prompt, and a completion that ends anywhere in its second half."""
    generator = torch.Generator().manual_seed(seed)
    k, prompt = arguments.sequences, max(1, round(arguments.prompt * length))
    completion = length - prompt
    ids = torch.randint(3, arguments.vocabulary, (k, length), generator=generator)
    ends = torch.randint(completion // 2, completion + 1, (k, 1), generator=generator)
    mask = (torch.arange(completion) < ends).long()
    inputs = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": torch.ones(k, prompt, dtype=torch.long),
        "completion_ids": ids[:, prompt:],
        "completion_mask": mask,
        "advantages": torch.randn(k, generator=generator),
        "num_items_in_batch": mask.sum() * arguments.microbatches,
    }
    return {name: value.to(arguments.device) for name, value in inputs.items()}


def make_microbatches(arguments: argparse.Namespace, length: int) -> list[dict[str, torch.Tensor]]:
    """The microbatches of an optimizer step."""
    return [make_inputs(arguments, length, seed) for seed in range(arguments.microbatches)]


def clock(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step(trainer: GRPOTrainer, microbatches: Sequence[dict[str, torch.Tensor]], device: str) -> tuple[float, int]:
    """Seconds of one optimizer step, and the peak of memory on CUDA in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(device)
    for i, inputs in enumerate(microbatches):
        trainer.accelerator.gradient_state._set_sync_gradients(i == len(microbatches) - 1)
        loss = trainer.compute_loss(trainer.model, inputs)
        trainer.accelerator.backward(loss)
    update(trainer)
    elapsed = clock(device) - start
    trainer._metrics["train"].clear()
    return elapsed, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def update(trainer: GRPOTrainer) -> None:
    """What follows the last microbatch of an optimizer step."""
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def peak_resident_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Stopwatch(TrainerCallback):
    """
    Seconds of each optimizer step of `train()`, what the callbacks before this one do at its end included.

    Args:
        device (`str`): Where the model is.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.start = clock(self.device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(clock(self.device) - self.start)


class StepProfile:
    """
    Where the time of optimizer steps goes on a CPU. There, the backward pass runs in the calling thread, which is the
    only one that a profile sees.

    Args:
        trainer (`GRPOTrainer`): A prepared trainer, which has made a step before.
        microbatches (`Sequence[dict]`): The microbatches of a step.
        repeats (`int`): Number of steps.

    Attributes:
        seconds (`float`): Time of all the steps.
    """

    def __init__(self, trainer: GRPOTrainer, microbatches: Sequence[dict[str, torch.Tensor]], repeats: int):
        profile = cProfile.Profile(builtins=False)
        self.seconds = 0.0
        for _ in range(repeats):
            profile.enable()
            elapsed, _ = step(trainer, microbatches, "cpu")
            profile.disable()
            self.seconds += elapsed
        self.functions: Mapping[tuple[str, int, str], tuple] = pstats.Stats(profile).stats

    def time(self, *functions: tuple[str, str], caller: tuple[str, str] | None = None) -> float:
        """
        Seconds within functions of the package, with all that they call.

        Args:
            functions (`tuple[str, str]`): File, relative to the package, and name. Where one calls another, or itself,
                the time counts once.
            caller (`tuple[str, str]`, *optional*): Only calls by this function count.

        Raises:
            LookupError: If a file has no such function.
        """
        wanted = {self._find(*function) for function in functions}
        callers = None if caller is None else {self._find(*caller)}
        total = 0.0
        for (file, _, name), (*_, called_by) in self.functions.items():
            if (file, name) in wanted:
                for (caller_file, _, caller_name), (*_, seconds) in called_by.items():
                    key = (caller_file, caller_name)
                    if key not in wanted if callers is None else key in callers:
                        total += seconds
        return total

    def _find(self, file: str, name: str) -> tuple[str, str]:
        path = Path(proma_trl.__file__).parent / file
        if f"def {name}(" not in path.read_text():
            raise LookupError(f"{path} has no function `{name}`.")
        return str(path), name


def take_turns(functions: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each of the functions returns in `repeats` turns, after a turn that warms up."""
    results: dict[str, list[T]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            result = function()
            if repeat > 0:
                results[name].append(result)
    return results


def median_ratio(taken: Sequence[float], reference: Sequence[float]) -> float:
    """Median over turns of the ratio to the reference's time."""
    return statistics.median(a / b for a, b in zip(taken, reference, strict=True))


def write(arguments: argparse.Namespace, results: list[dict]) -> None:
    """Write settings, environment and results to `arguments.output`, if it is set."""
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        written = {"settings": settings, "environment": environment, "results": results}
        arguments.output.write_text(json.dumps(written, indent=2, default=str) + "\n")
