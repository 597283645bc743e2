"""What the recipes that train have in common: options, the choice of the algorithm, what a run leaves behind."""

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import trl
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOConfig, ModelConfig, get_peft_config, get_quantization_config

from proma_trl import DPPOConfig, DPPOTrainer, PROMAConfig, PROMATrainer
from proma_trl.check import missing_model
from proma_trl.controls import MatchedLengthTrainer, RandomDirectionsTrainer
from proma_trl.recipes.algorithms import Algorithm
from proma_trl.recipes.parser import RecipeParser, UsageError, read_settings
from proma_trl.tools.callbacks import ACCURACY, JSONLMetrics
from proma_trl.tools.curves import read_curves
from proma_trl.tools.figures import PANELS, draw_runs
from proma_trl.tools.policy_metrics import PolicyMetrics
from proma_trl.tools.update_overlap import UpdateOverlap
from proma_trl.trainer.model_card import FIGURE, CardDataset, ModelCardMixin
from proma_trl.trainer.precision import choose_precision
from proma_trl.trainer.run_description import SayWhatRuns
from proma_trl.trainer.setup_checks import RefuseNoSteps
from proma_trl.trainer.trl_internals import rollouts_in_order

# The demo's policy, which is on this machine once the demo has run
MODEL_TO_TRY = "`proma-trl demo` leaves a small one to try your data on, in runs/demo/warm_start."

# The dimension of Intra-PROMA's subspaces in the paper's best runs
INTRA_DIM = 10


@dataclass
class RunArguments:
    """What all recipes ask for beside the trainer's and the model's settings."""

    algorithm: Algorithm = field(
        default="proma",
        metadata={
            "help": "How policy gradients become updates: `proma`, the accumulation-based variant, with ISOPO before "
            "it where `isopo` is set; `proma_intra`, Intra-PROMA, with an `intra_dim` of 10 unless it is set; "
            "`proma_both`, both variants; `isopo` alone, `natural` unless `isopo` is set; `dppo`, DPPO's trust region "
            "alone, which all of the others have, too, where `divergence` is set; `reinforce`, which is none of "
            "these; or `grpo`, TRL's own GRPOTrainer with its clipping. Two are controls: `proma_random`, PROMA's "
            "projection along the directions of random other sequences, and `reinforce_matched`, REINFORCE with the "
            "length of PROMA's updates, or with that of the variants that the settings choose. One file of settings "
            "serves them all: an algorithm leaves the settings of the methods that it does not have unused."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Problems whose prompt has more tokens are not trained on."}
    )
    kl_every: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between two measurements of the KL divergence between the policies before and "
            "after a step (`kl/local`), and from the initial policy (`kl/global`). A measured step "
            "takes about one and a half times as long. 0 switches them off."
        },
    )
    kl_lag: int | None = field(
        default=None,
        metadata={"help": "Also measure `kl/lagged`, from the policy as many optimizer steps earlier."},
    )
    kl_exact: bool = field(
        default=False,
        metadata={"help": "Sum KL divergences over the whole vocabulary instead of estimating them: small models."},
    )

    whole_groups: bool = field(
        default=False,
        metadata={
            "help": "Leave a rollout's sequences in the order of their prompts, so that a microbatch holds whole "
            "groups where `per_device_train_batch_size` is a multiple of `num_generations`. TRL shuffles them."
        },
    )
    overlap_every: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between two measurements of the overlap between a step's parameter update and "
            "its sequences' gradients (`update/*`), which takes a backward pass of each sequence. 0 switches them "
            "off."
        },
    )

    def __post_init__(self):
        # Those of recipes, too
        for name in (own.name for own in dataclasses.fields(self) if own.name.endswith("_every")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative. Set it to 0 to switch it off.")


class GRPOTrainer(ModelCardMixin, trl.GRPOTrainer):
    """TRL's trainer. Its model card says as much as PROMA's."""

    _card_settings = ("epsilon", "epsilon_high", "beta")


@dataclass
class BaselineConfig(GRPOConfig):
    """GRPO's settings, and float32 on a CPU as with [`PROMAConfig`]."""

    def __post_init__(self):
        choose_precision(self)
        super().__post_init__()


def choose_algorithm(arguments: list[str]) -> str:
    """Finds the algorithm on the command line or in the YAML file: it decides which other options there are."""
    early = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage="%(prog)s [options]; %(prog)s --help lists them"
    )
    early.add_argument("--algorithm")
    early.add_argument("--config")
    known, _ = early.parse_known_args(arguments)
    algorithm = known.algorithm
    if known.config is not None:
        try:
            settings = read_settings(known.config)
        except ValueError as error:
            early.error(str(error))
        if algorithm is None:
            algorithm = settings.get("algorithm")
    algorithm = algorithm or RunArguments.algorithm
    if algorithm not in get_args(Algorithm):
        early.error(f"--algorithm: {algorithm!r} is none of {', '.join(get_args(Algorithm))}")
    return algorithm


def make_parser(recipe: type[RunArguments], algorithm: str, description: str | None = None) -> RecipeParser:
    """Returns the parser of all options: the recipe's, the trainer's and the model's."""
    if algorithm == "grpo":
        # One YAML file serves all algorithms, so PROMA's own fields are taken here too, and left unused.
        inherited = {inherited_field.name for inherited_field in dataclasses.fields(GRPOConfig)}
        projection_arguments = dataclasses.make_dataclass(
            "ProjectionArguments",
            [
                (own.name, own.type, field(default=own.default, metadata=own.metadata))
                for own in dataclasses.fields(PROMAConfig)
                if own.name not in inherited
            ],
        )
        groups = [recipe, BaselineConfig, ModelConfig, projection_arguments]
    else:
        groups = [recipe, DPPOConfig if algorithm == "dppo" else PROMAConfig, ModelConfig]
    parser = RecipeParser(groups, description=description)
    # One batch for all, to compare them by
    parser.set_defaults(gradient_accumulation_steps=PROMAConfig.gradient_accumulation_steps)
    return parser


def parse(
    recipe: type[RunArguments],
    arguments: list[str],
    description: str | None,
    check_rest: Callable[[RecipeParser, list[str]], list[str]] = RecipeParser.unknown_options,
) -> tuple[RunArguments, GRPOConfig, ModelConfig]:
    """
    Parses the options of a recipe, of the trainer and of the model, from the command line and from a YAML file.

    Args:
        recipe (`type`): The recipe's own options.
        arguments (`list[str]`): The command line.
        description (`str`, *optional*): What `--help` says of the recipe.
        check_rest (`Callable`): Takes the parser and options that it does not know, and says what is wrong with them.

    Raises:
        SystemExit: For an unknown algorithm or file.
        UsageError: For settings that are unknown, out of range, or not available together, with a line for each.
    """
    algorithm = choose_algorithm(arguments)
    parser, problems = make_parser(recipe, algorithm, description), []
    try:
        parser.parse_args_and_config(arguments, check_rest=lambda rest: check_rest(parser, rest))
    except ValueError as error:
        problems.append(str(error))
    args, training_args, model_args, *_ = parser.parsed or (None, None, None)
    if model_args is not None and model_args.model_name_or_path is None:
        problems.append(
            "model_name_or_path is not set. Set it to a model on the Hugging Face Hub or a local folder. "
            f"{MODEL_TO_TRY}"
        )
    if training_args is not None:
        problems += out_of_range(training_args)
    if problems:
        raise UsageError("\n".join(problems))
    if algorithm != "grpo":
        set_methods(algorithm, training_args)
        if args.whole_groups:
            training_args.order_by_length = False
    return args, training_args, model_args


def out_of_range(training_args: GRPOConfig) -> list[str]:
    """A sentence for each setting with which transformers would train nothing, or away from the reward."""
    problems = [
        f"{name}={getattr(training_args, name)} is negative. Set it to 0 or more."
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
        if (getattr(training_args, name) or 0) < 0
    ]
    problems += [
        f"{name}={getattr(training_args, name)} is not positive."
        for name in ("num_train_epochs", "temperature", "max_completion_length")
        if getattr(training_args, name) <= 0
    ]
    if training_args.max_steps < 1 and training_args.max_steps != -1:
        problems.append(
            f"max_steps={training_args.max_steps} is not positive. Leave it out to train for whole epochs."
        )
    return problems


def check_model(model_args: ModelConfig, trust_remote_code: bool) -> None:
    """
    Check that there is a model, by its configuration alone.

    Raises:
        UsageError: If there is none.
    """
    name = model_args.model_name_or_path
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"{missing_model(name, error)} {MODEL_TO_TRY}") from error


def check_checkpoint(training_args: GRPOConfig) -> None:
    """
    Check that there is a checkpoint to resume from, where the settings say so.

    Raises:
        UsageError: If there is none.
    """
    resume = checkpoint_of(training_args)
    if resume is True and not any(Path(training_args.output_dir).glob("checkpoint-*")):
        raise UsageError(
            f"resume_from_checkpoint: there is no checkpoint in {training_args.output_dir}. Leave it out to begin "
            "anew."
        )
    if isinstance(resume, str) and not os.path.isdir(resume):
        raise UsageError(f"resume_from_checkpoint: there is no folder {resume!r}. Set it to a checkpoint, or to true.")


def checkpoint_of(training_args: GRPOConfig) -> str | bool | None:
    """What to resume from: a folder, `True` for the last checkpoint, or `None`."""
    given = training_args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(given).lower(), given)


def set_methods(algorithm: str, training_args: PROMAConfig) -> None:
    """Switches on the methods that an algorithm has, and off those that it does not have."""
    if algorithm not in ("proma", "proma_both", "proma_random", "reinforce_matched"):
        training_args.projection = "none"
    if algorithm not in ("proma_intra", "proma_both", "reinforce_matched"):
        training_args.intra_dim = 0
    elif training_args.intra_dim == 0 and algorithm != "reinforce_matched":
        training_args.intra_dim = INTRA_DIM
    if algorithm in ("proma_intra", "dppo", "reinforce", "proma_random"):
        training_args.isopo = "none"
    elif algorithm == "isopo" and training_args.isopo == "none":
        training_args.isopo = "natural"
    if algorithm == "reinforce":
        training_args.divergence = None


def make_trainer(
    args: RunArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    reward_funcs: list[Callable[..., list[float | None]]],
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
) -> trl.GRPOTrainer:
    """Returns the algorithm's trainer, which writes `metrics.jsonl`."""
    init_kwargs: dict[str, Any] = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = init_kwargs | (training_args.model_init_kwargs or {})
    trainer_class = {
        "grpo": GRPOTrainer,
        "dppo": DPPOTrainer,
        "proma_random": RandomDirectionsTrainer,
        "reinforce_matched": MatchedLengthTrainer,
    }.get(args.algorithm, PROMATrainer)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
        processing_class=processing_class,
        callbacks=[JSONLMetrics()],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if trainer_class is GRPOTrainer:  # the others have them
        trainer.add_callback(RefuseNoSteps())
        trainer.add_callback(SayWhatRuns(trainer))
    return trainer


def run(trainer: trl.GRPOTrainer, args: RunArguments, card_dataset: CardDataset | None = None) -> None:
    """Trains, from a checkpoint if the settings say so, and saves or pushes what the run leaves behind."""
    training_args = trainer.args
    if args.kl_every > 0:
        trainer.add_callback(PolicyMetrics(trainer, args.kl_every, lag=args.kl_lag, exact=args.kl_exact))
    if args.overlap_every > 0:
        trainer.add_callback(UpdateOverlap(trainer, args.overlap_every))
    # A card names datasets that others can find.
    if card_dataset is not None and not os.path.exists(card_dataset.name):
        trainer.card_dataset = card_dataset

    with rollouts_in_order() if args.whole_groups else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint_of(training_args))
    accuracies = [record[ACCURACY] for record in trainer.state.log_history if ACCURACY in record]
    if accuracies:
        trainer.accelerator.print(f"Greedy accuracy: {accuracies[0]:.1%} before training, {accuracies[-1]:.1%} after.")

    if trainer.is_world_process_zero():
        draw_figure(Path(training_args.output_dir), args.algorithm)
    if training_args.push_to_hub:
        # Saves what it pushes.
        trainer.push_to_hub()
        trainer.accelerator.print(f"Pushed the run to {trainer.hub_model_id}.")
    else:
        trainer.save_model(training_args.output_dir)
        trainer.create_model_card(model_name=Path(training_args.output_dir).name)
    trainer.accelerator.print(f"Saved the policy, its card and metrics.jsonl in {training_args.output_dir}.")
    # Closes trackers and process groups, when the main process, too, has written what it has to.
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def draw_figure(folder: Path, algorithm: str) -> None:
    """Draws the run for its model card, where matplotlib is installed and all that the figure shows was measured."""
    curves = read_curves(folder)
    if importlib.util.find_spec("matplotlib") and curves.keys() >= PANELS.keys():
        draw_runs({algorithm: [curves]}, folder / Path(FIGURE).stem)
