"""
Trains a policy on GSM8K, or on problems of its form, with PROMA or one of its baselines.

    accelerate launch recipes/gsm8k.py --config recipes/configs/qwen3_0.6b_gsm8k.yaml --algorithm proma

The run leaves in `output_dir`: the policy and its tokenizer, a model card, checkpoints, and `metrics.jsonl`; where
matplotlib is installed and `kl_every` and `eval_every` are set, `figure.png`, too. `--push_to_hub` pushes them.
"""

import argparse
import dataclasses
import gc
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import trl
import yaml
from transformers import AutoTokenizer
from trl import GRPOConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from proma_trl import DPPOConfig, DPPOTrainer, PROMAConfig, PROMATrainer
from proma_trl.tools.callbacks import ACCURACY, GreedyEvaluation, JSONLMetrics
from proma_trl.tools.curves import read_curves
from proma_trl.tools.data import drop_long_prompts, load_gsm8k, solved_examples
from proma_trl.tools.figures import PANELS, draw_runs
from proma_trl.tools.policy_metrics import PolicyMetrics
from proma_trl.tools.rewards import accuracy_reward, format_reward
from proma_trl.trainer.model_card import FIGURE, CardDataset, ModelCardMixin

Algorithm = Literal["proma", "proma_intra", "proma_both", "isopo", "dppo", "reinforce", "grpo"]

# The dimension of Intra-PROMA's subspaces in the paper's best runs
INTRA_DIM = 10


@dataclass
class GSM8KArguments:
    """What to train with, and on what."""

    algorithm: Algorithm = field(
        default="proma",
        metadata={
            "help": "How policy gradients become updates: `proma`, the accumulation-based variant, with ISOPO before "
            "it where `isopo` is set; `proma_intra`, Intra-PROMA, with an `intra_dim` of 10 unless it is set; "
            "`proma_both`, both variants; `isopo` alone, `natural` unless `isopo` is set; `dppo`, DPPO's trust region "
            "alone, which all of the others have, too, where `divergence` is set; `reinforce`, which is none of "
            "these; or `grpo`, TRL's own GRPOTrainer with its clipping. One file of settings serves them all: an "
            "algorithm leaves the settings of the methods that it does not have unused."
        },
    )
    dataset_name: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "Problems with the columns `question` and `answer`, the latter ending with `#### <number>`: a "
            "dataset on the Hugging Face Hub, a local folder (with train.jsonl and test.jsonl, Parquet files, or as "
            "written by `save_to_disk`), or a JSON Lines file."
        },
    )
    dataset_config: str | None = field(default="main", metadata={"help": "The dataset's configuration on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "The problems to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "The problems held out for evaluation."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Problems whose prompt has more tokens are not trained on."}
    )
    num_examples: int = field(
        default=0,
        metadata={
            "help": "Solved problems shown before each problem, the first of the training split, which are then not "
            "trained on. Small models need one to know the form of an answer."
        },
    )
    format_reward_weight: float = field(
        default=0.0,
        metadata={
            "help": "What is added to the reward, 1 for a right final answer, where a completion ends with one line "
            "`#### <number>`."
        },
    )
    eval_every: int = field(
        default=20,
        metadata={
            "help": "Optimizer steps between two evaluations with greedy decoding on the held-out problems, which "
            "also take place before and after training. 0 switches them off."
        },
    )
    eval_samples: int | None = field(
        default=None, metadata={"help": "How many of the held-out problems to evaluate on; by default all."}
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

    def __post_init__(self):
        for name in ("eval_every", "kl_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative. Set it to 0 to switch it off.")
        if self.num_examples < 0:
            raise ValueError(f"num_examples={self.num_examples} is negative. Set it to 0 for none.")
        if self.eval_samples is not None and self.eval_samples < 1:
            raise ValueError(f"eval_samples={self.eval_samples} is not positive. Leave it out to use all problems.")


class GRPOTrainer(ModelCardMixin, trl.GRPOTrainer):
    """TRL's trainer. Its model card says as much as PROMA's."""

    _card_settings = ("epsilon", "epsilon_high", "beta")


def draw_figure(folder: Path, algorithm: str) -> None:
    """Draws the run for its model card, where matplotlib is installed and all that the figure shows was measured."""
    curves = read_curves(folder)
    if importlib.util.find_spec("matplotlib") and curves.keys() >= PANELS.keys():
        draw_runs({algorithm: [curves]}, folder / Path(FIGURE).stem)


def choose_algorithm(arguments: list[str]) -> str:
    """Finds the algorithm on the command line or in the YAML file: it decides which other options there are."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--algorithm")
    early.add_argument("--config")
    known, _ = early.parse_known_args(arguments)
    algorithm = known.algorithm
    if known.config is not None:
        if not os.path.isfile(known.config):
            early.error(f"--config: there is no file {known.config!r}")
        with open(known.config) as file:
            settings = yaml.safe_load(file)
        if algorithm is None and isinstance(settings, dict):
            algorithm = settings.get("algorithm")
    algorithm = algorithm or GSM8KArguments.algorithm
    if algorithm not in get_args(Algorithm):
        early.error(f"--algorithm: {algorithm!r} is none of {', '.join(get_args(Algorithm))}")
    return algorithm


def make_parser(algorithm: str) -> TrlParser:
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
        groups = [GSM8KArguments, GRPOConfig, ModelConfig, projection_arguments]
    else:
        groups = [GSM8KArguments, DPPOConfig if algorithm == "dppo" else PROMAConfig, ModelConfig]
    parser = TrlParser(groups, description=__doc__, formatter_class=HelpFormatter)
    # TrlParser reads the file itself, before argparse sees the option. This is for --help.
    parser.add_argument(
        "--config", help="A YAML file with any of these options; the command line wins.", default=argparse.SUPPRESS
    )
    return parser


def set_methods(algorithm: str, training_args: PROMAConfig) -> None:
    """Switches on the methods that an algorithm has, and off those that it does not have."""
    if not algorithm.startswith("proma") or algorithm == "proma_intra":
        training_args.projection = "none"
    if algorithm not in ("proma_intra", "proma_both"):
        training_args.intra_dim = 0
    elif training_args.intra_dim == 0:
        training_args.intra_dim = INTRA_DIM
    if algorithm in ("proma_intra", "dppo", "reinforce"):
        training_args.isopo = "none"
    elif algorithm == "isopo" and training_args.isopo == "none":
        training_args.isopo = "natural"
    if algorithm == "reinforce":
        training_args.divergence = None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every option, and the description's lines as they are."""


def main(arguments: list[str]) -> None:
    """Parses the options, trains, and saves what the run leaves behind."""
    algorithm = choose_algorithm(arguments)
    args, training_args, model_args, *_ = make_parser(algorithm).parse_args_and_config(arguments)
    if algorithm != "grpo":
        set_methods(algorithm, training_args)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set. Set it to a model on the Hugging Face Hub or a local folder.")
    if training_args.reward_weights is not None:
        raise ValueError("reward_weights is not used here. Set format_reward_weight instead.")

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        padding_side="left",
    )

    source = (args.dataset_name, args.dataset_config)
    examples = solved_examples(args.num_examples, *source, args.dataset_train_split) if args.num_examples else ()

    def load(split):
        return load_gsm8k(*source, split, tokenizer.chat_template is not None, examples)

    train_dataset = load(args.dataset_train_split)
    train_dataset = train_dataset.select(range(args.num_examples, len(train_dataset)))
    if args.max_prompt_length is not None:
        train_dataset = drop_long_prompts(
            train_dataset, tokenizer, args.max_prompt_length, training_args.chat_template_kwargs
        )
    held_out = None
    if args.eval_every > 0 or training_args.eval_strategy != "no":
        held_out = load(args.dataset_test_split)
        held_out = held_out.select(range(min(args.eval_samples or len(held_out), len(held_out))))

    reward_funcs = [accuracy_reward]
    if args.format_reward_weight != 0:
        reward_funcs.append(format_reward)
        training_args.reward_weights = [1.0, args.format_reward_weight]

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer_class = {"grpo": GRPOTrainer, "dppo": DPPOTrainer}.get(algorithm, PROMATrainer)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=held_out if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[JSONLMetrics()],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if args.eval_every > 0:
        trainer.add_callback(GreedyEvaluation(trainer, held_out, args.eval_every))
    if args.kl_every > 0:
        trainer.add_callback(PolicyMetrics(trainer, args.kl_every, lag=args.kl_lag, exact=args.kl_exact))
    # A card names datasets that others can find.
    if not os.path.exists(args.dataset_name):
        part = f"[:{args.eval_samples}]" if args.eval_samples else ""
        trainer.card_dataset = CardDataset(args.dataset_name, args.dataset_config, args.dataset_test_split + part)

    resume = {"true": True, "false": None}.get(
        str(training_args.resume_from_checkpoint).lower(), training_args.resume_from_checkpoint
    )
    trainer.train(resume_from_checkpoint=resume)
    accuracies = [record[ACCURACY] for record in trainer.state.log_history if ACCURACY in record]
    if accuracies:
        trainer.accelerator.print(f"Greedy accuracy: {accuracies[0]:.1%} before training, {accuracies[-1]:.1%} after.")

    if trainer.is_world_process_zero():
        draw_figure(Path(training_args.output_dir), algorithm)
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


if __name__ == "__main__":
    main(sys.argv[1:])
    # Between CPUs, Gloo's threads end with the last reference to a process group, and need a living interpreter for it
    gc.collect()
