"""
Says whether PROMA trains a model, and how each of its layers yields the gradients of single sequences.

    proma-trl check Qwen/Qwen3-30B-A3B --microbatch_size 8
    proma-trl check Qwen/Qwen3-30B-A3B --use_peft --lora_target_modules q_proj v_proj

The model is made without weights from its configuration, on the Hugging Face Hub or in a local folder. The exit status
is 0 if it trains, and 1 if not. With one sequence a microbatch, and with Intra-PROMA alone, every model does.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections import Counter
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, PreTrainedModel

from .sequence_grads import Planned, plan_linear_layers, plan_modules
from .sequence_grads.embedding import EmbeddingLayer
from .sequence_grads.norm import BroadcastLayer
from .sequence_grads.registry import RuleLayer
from .sequence_grads.rerun import RerunLayer
from .validation import encoder_decoder_refusal, nothing_to_train

RULE, RERUN, NONE = "by a rule of its own", "by running again", "not at all"

_GIB = 2**30


@dataclass(frozen=True)
class Way:
    """
    The layers whose sequence gradients are found in one way.

    Attributes:
        how (`str`): `RULE`, `RERUN` or `NONE`.
        kinds (`dict[str, int]`): Classes of modules, and how many there are of each.
        parameters (`int`): Number of trained parameters.
        reasons (`list[str]`): Why not, once for each class.
    """

    how: str
    kinds: dict[str, int]
    parameters: int
    reasons: list[str]


@dataclass(frozen=True)
class Report:
    """
    What PROMA makes of a model.

    Attributes:
        ways (`list[Way]`): How sequence gradients are found.
        microbatch_size (`int`): k.
        trained (`int`): Number of trained parameters.
        intra (`int`): Number of those that Intra-PROMA projects.
        rerun_share (`float`): Part of the parameters that a token meets in modules that run again.
        largest_rerun (`tuple[str, int]` or `None`): The largest tensor in them, and its number of elements.
        refusal (`str` or `None`): Why nothing of this package trains the model, whatever the microbatch size.
    """

    ways: list[Way]
    microbatch_size: int
    trained: int
    intra: int
    rerun_share: float
    largest_rerun: tuple[str, int] | None
    refusal: str | None = None

    @property
    def trains(self) -> bool:
        """Whether accumulation-based PROMA trains the model at this microbatch size."""
        return self.refusal is None and (self.microbatch_size == 1 or all(way.how != NONE for way in self.ways))

    def __str__(self) -> str:
        if self.refusal is not None:
            return self.refusal
        lines = [f"{self.trained:,} parameters are trained. The gradients of single sequences are found"]
        if self.microbatch_size == 1:
            lines = [f"{self.trained:,} parameters are trained. With one sequence a microbatch, all of them train."]
        for way in self.ways if self.microbatch_size > 1 else ():
            kinds = ", ".join(f"{count} {kind}" for kind, count in way.kinds.items())
            lines.append(f"  {way.how}, {way.parameters / max(1, self.trained):.1%} of these parameters: {kinds}")
            lines += [f"    {reason}" for reason in way.reasons]
        if self.largest_rerun is not None and self.microbatch_size > 1:
            name, size = self.largest_rerun
            lines.append(
                "What runs again costs one more forward and backward pass of modules that hold "
                f"{self.rerun_share:.0%} of the parameters that a token meets, and memory for {self.microbatch_size} "
                f"gradients of one tensor at a time: {self.microbatch_size * size * 4 / _GIB:.2f} GiB in float32 for "
                f"the largest, `{name}`."
            )
        lines.append(f"Intra-PROMA projects {self.intra / max(1, self.trained):.1%} of them, at any microbatch size.")
        size = "one sequence" if self.microbatch_size == 1 else f"{self.microbatch_size} sequences"
        if self.trains:
            lines.append(f"It trains with {size} a microbatch.")
        else:
            lines.append(
                f"It does not train with {size} a microbatch. Freeze what has no gradients "
                "of single sequences, register a rule (`proma_trl.register_rule`), train with "
                '`per_device_train_batch_size=1`, or with Intra-PROMA alone (`projection="none", intra_dim=10`).'
            )
        return "\n".join(lines)


def check(model: nn.Module, microbatch_size: int = 8) -> Report:
    """
    Find out how the layers of a model yield the gradients of single sequences. Nothing is run but trials of single
    layers on noise.

    Args:
        model (`nn.Module`): The model, with or without adapters, on any device, `"meta"` included.
        microbatch_size (`int`, defaults to `8`): Sequences in a microbatch.
    """
    planned = plan_modules(model)
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    matrices = {matrix for layer in plan_linear_layers(model, head=True) for matrix in layer.matrices}
    again = [entry for entry in planned if isinstance(entry.layer, RerunLayer)]
    sizes = {f"{entry.name}.{name}": param.numel() for entry in again for name, param in entry.layer.params.items()}
    largest = max(sizes, key=sizes.get, default=None)
    return Report(
        ways=[way for how in (RULE, RERUN, NONE) if (way := _way(how, planned)) is not None],
        microbatch_size=microbatch_size,
        trained=trained,
        intra=sum(matrix.numel() for matrix in matrices),
        rerun_share=_active([entry.module for entry in again]) / max(1, _active([model])),
        largest_rerun=None if largest is None else (largest, sizes[largest]),
        refusal=encoder_decoder_refusal(model) or nothing_to_train(model),
    )


def missing_model(name: str, error: Exception) -> str:
    """A sentence on a model whose configuration can't be read."""
    if os.path.isdir(name):
        reason = f"is a folder without a model that can be read: {_first_line(error)}"
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        reason = "is no folder."
    elif isinstance(error, OSError):
        reason = "is neither a local folder nor a model within reach on the Hugging Face Hub."
    else:
        reason = f"can't be read: {_first_line(error)}"
    return f"model_name_or_path={name!r} {reason}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def make_model(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedModel:
    """A model from its configuration, on the meta device, which holds no numbers."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        if kind is not None:
            return kind(config)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _how(entry: Planned) -> str:
    if isinstance(entry.layer, (RuleLayer, BroadcastLayer, EmbeddingLayer)):
        return RULE
    return RERUN if isinstance(entry.layer, RerunLayer) else NONE


def _way(how: str, planned: list[Planned]) -> Way | None:
    entries = [entry for entry in planned if _how(entry) == how]
    if not entries:
        return None
    params = set()
    for entry in entries:
        own = entry.module.parameters(recurse=False) if how == NONE else entry.layer.params.values()
        params.update(param for param in own if param.requires_grad)
    kinds = Counter(type(entry.module).__name__ for entry in entries)
    reasons = {type(entry.module).__name__: f"{entry.name or 'the model itself'}: {entry.layer}" for entry in entries}
    return Way(how, dict(kinds), sum(param.numel() for param in params), [*reasons.values()] if how == NONE else [])


def _active(modules: list[nn.Module]) -> float:
    """Number of parameters that one token meets: of a mixture's experts, the chosen ones."""
    shares: dict[nn.Parameter, float] = {}
    for module in modules:
        for part in module.modules():
            share = 1.0
            if hasattr(part, "num_experts") and any(param.dim() == 3 for param in part.parameters(recurse=False)):
                chosen = getattr(getattr(part, "config", None), "num_experts_per_tok", None)
                share = (chosen or part.num_experts) / part.num_experts
            shares.update((param, share) for param in part.parameters(recurse=False))
    return sum(share * param.numel() for param, share in shares.items())


def main(arguments: list[str]) -> int:
    """Parses the options and prints the report. Returns the exit status."""
    from trl import ModelConfig, get_peft_config

    parser = HfArgumentParser(
        [ModelConfig],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="proma-trl check",
        usage="%(prog)s MODEL [options]; %(prog)s --help lists them",
    )
    parser.add_argument("model", nargs="?", help="a model on the Hugging Face Hub, or a local folder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--microbatch_size", type=int, default=8, help="sequences in a microbatch (default: 8)")
    for action in parser._actions:
        if action.dest == "model_name_or_path":
            action.help = argparse.SUPPRESS  # as `train` calls it; one name is enough
    peft_args, own, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    name = own.model or peft_args.model_name_or_path
    if rest:
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        near = difflib.get_close_matches(rest[0], options, n=1, cutoff=0.7)
        parser.error(f"unknown option {rest[0]}{f'; did you mean {near[0]}?' if near else ''}")
    if name is None:
        parser.error("name a model on the Hugging Face Hub, or a local folder")
    if own.microbatch_size < 1:
        parser.error(f"--microbatch_size: {own.microbatch_size} is not positive")
    try:
        model = make_model(name, own.trust_remote_code, peft_args.model_revision)
    except (OSError, ValueError) as error:
        parser.error(missing_model(name, error))
    peft_config = get_peft_config(peft_args)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    report = check(model, own.microbatch_size)
    print(f"{name} ({type(model).__name__})\n{report}")
    return 0 if report.trains else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
