"""
Trains a policy with PROMA or one of its baselines, on any prompts, with any reward functions.

    proma-trl train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name prompts.jsonl --reward_funcs rewards.py:brevity

Without a model at hand: `--model_name_or_path runs/demo/warm_start`, once `proma-trl demo` has run.

A dataset has a column `prompt`, texts or lists of messages. Its other columns go to the reward functions as keyword
arguments, as in TRL. The run leaves in `output_dir`: the policy and its tokenizer, a model card, checkpoints, and
`metrics.jsonl`. `--push_to_hub` pushes them.
"""

import gc
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl.rewards
from datasets import Dataset
from transformers import AutoProcessor, AutoTokenizer
from trl import GRPOConfig, ModelConfig

from proma_trl.recipes.training import RunArguments, check_checkpoint, check_model, make_trainer, parse, run
from proma_trl.tools.data import drop_long_prompts, has_images, load_columns
from proma_trl.trainer.model_card import CardDataset
from proma_trl.trainer.reward_checks import RewardError, check_rewards, check_weights, returning_rewards
from proma_trl.trainer.setup_checks import check_prompts, too_few_prompts

RewardFunction = Callable[..., list[float | None]]

NAMED_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


@dataclass
class TrainArguments(RunArguments):
    """What to train with, on which prompts, and for which rewards."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts, in a column `prompt`: a dataset on the Hugging Face Hub, a local folder (with "
            "train.jsonl and test.jsonl, Parquet files, or as written by `save_to_disk`), or a JSON Lines, JSON or "
            "Parquet file."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "The prompts to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "The prompts to evaluate on, where `eval_strategy` is set."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"The reward functions: one of TRL's ({', '.join(NAMED_REWARDS)}), a function in a file "
            "(`rewards.py:brevity`), or one that can be imported (`my_package.rewards.brevity`). They are called as "
            "TRL's trainers call them, with `prompts`, `completions` and the dataset's other columns, and return one "
            "reward per completion. `reward_weights` weighs them."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        problems = []
        if self.dataset_name is None:
            problems.append("dataset_name is not set. Set it to a dataset on the Hugging Face Hub or a local one.")
        if not self.reward_funcs:
            problems.append(
                f"reward_funcs is not set. Name one or more functions: {', '.join(NAMED_REWARDS)}, "
                "`rewards.py:function` or `my_package.rewards.function`."
            )
        if problems:
            raise ValueError("\n".join(problems))


def load_reward(name: str) -> RewardFunction:
    """
    Returns a reward function by its name in TRL, its file (`rewards.py:brevity`) or its module (`rewards.brevity`).

    Raises:
        ValueError: If there is no such function.
    """
    if name in NAMED_REWARDS:
        return getattr(trl.rewards, name)
    path, _, function = name.rpartition(":")
    try:
        found = getattr(_load_file(Path(path)), function) if path.endswith(".py") else _import(name)
    except (AttributeError, ImportError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"reward_funcs: {name!r} can't be loaded ({error}). Name one of {', '.join(NAMED_REWARDS)}, a function in "
            "a file (`rewards.py:function`), or one that can be imported (`my_package.rewards.function`)."
        ) from error
    if not callable(found):
        raise ValueError(f"reward_funcs: {name!r} is {found!r}, which can't be called. Name a function.")
    return found


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    # Modules beside the user, wherever this file lies
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return pkgutil.resolve_name(name)


def check_prompt_column(rows: Dataset, name: str) -> None:
    """
    Check that prompts are texts or lists of messages.

    Raises:
        ValueError: If not, with the first row that is neither.
    """
    kind = rows.features["prompt"]
    if getattr(kind, "dtype", None) in ("string", "large_string"):
        return
    for number, prompt in enumerate(rows["prompt"]):
        messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not (isinstance(prompt, str) or messages):
            raise ValueError(
                f"{name}, row {number}: its prompt is neither a text nor a list of messages: {str(prompt)[:60]}"
            )


def prepare(
    args: TrainArguments, training_args: GRPOConfig, model_args: ModelConfig, num_processes: int
) -> tuple[list[RewardFunction], Dataset, Dataset | None]:
    """
    Loads the reward functions and the data, and checks that they fit, and that the model is there.

    Args:
        args (`TrainArguments`), training_args ([`~trl.GRPOConfig`]), model_args ([`~trl.ModelConfig`]): The settings.
        num_processes (`int`): Number of ranks.

    Returns:
        The reward functions, the prompts to train on, and those to evaluate on.

    Raises:
        FileNotFoundError: For a model or a dataset that is not there.
        ValueError: For reward functions or data that can't be loaded, do not fit each other, or are too few.
    """
    reward_funcs = [load_reward(name) for name in args.reward_funcs]
    check_weights(training_args.reward_weights, args.reward_funcs)
    check_checkpoint(training_args)

    def load(split):
        rows = load_columns(args.dataset_name, args.dataset_config, split, ("prompt",))
        check_prompt_column(rows, args.dataset_name)
        check_rewards(reward_funcs, rows.column_names, args.dataset_name, args.reward_funcs)
        return rows

    train_dataset = load(args.dataset_train_split)
    held_out = load(args.dataset_test_split) if training_args.eval_strategy != "no" else None
    too_few = too_few_prompts(training_args, len(train_dataset), num_processes)
    if too_few is not None:
        raise ValueError(f"{args.dataset_name}: {too_few}")
    check_model(model_args, training_args.trust_remote_code)
    checked = [returning_rewards(func, name) for name, func in zip(args.reward_funcs, reward_funcs, strict=True)]
    return checked, train_dataset, held_out


def main(arguments: list[str]) -> None:
    """Parses the options, trains, and saves what the run leaves behind."""
    args, training_args, model_args = parse(TrainArguments, arguments, __doc__)
    reward_funcs, train_dataset, held_out = prepare(args, training_args, model_args, training_args.world_size)

    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    if args.max_prompt_length is not None:
        if has_images(train_dataset):
            raise ValueError(
                "max_prompt_length is not available for prompts with images, whose tokens it does not count. Leave "
                "it out, and drop long prompts from the dataset."
            )
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)
        train_dataset = drop_long_prompts(
            train_dataset, tokenizer, args.max_prompt_length, training_args.chat_template_kwargs
        )
        check_prompts(training_args, len(train_dataset), training_args.world_size)
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, padding_side="left", **source)

    trainer = make_trainer(args, training_args, model_args, reward_funcs, train_dataset, held_out, processor)
    held_out_split = args.dataset_test_split if held_out is not None else None
    try:
        run(trainer, args, CardDataset(args.dataset_name, args.dataset_config, held_out_split))
    except RewardError as error:
        sys.exit(f"proma-trl train: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
    # Between CPUs, Gloo's threads end with the last reference to a process group, and need a living interpreter for it
    gc.collect()
