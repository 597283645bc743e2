"""
Trains a policy on GSM8K, or on problems of its form, with PROMA or one of its baselines.

    accelerate launch recipes/gsm8k.py --config recipes/configs/qwen3_0.6b_gsm8k.yaml --algorithm proma

The run leaves in `output_dir`: the policy and its tokenizer, a model card, checkpoints, and `metrics.jsonl`; where
matplotlib is installed and `kl_every` and `eval_every` are set, `figure.png`, too. `--push_to_hub` pushes them.
"""

import gc
import sys
from dataclasses import dataclass, field

from transformers import AutoTokenizer

from proma_trl.recipes.training import RunArguments, check_checkpoint, check_model, make_trainer, parse, run
from proma_trl.tools.callbacks import GreedyEvaluation
from proma_trl.tools.data import drop_long_prompts, load_gsm8k, solved_examples
from proma_trl.tools.rewards import accuracy_reward, format_reward
from proma_trl.trainer.model_card import CardDataset
from proma_trl.trainer.setup_checks import check_prompts


@dataclass
class GSM8KArguments(RunArguments):
    """What to train with, and on which problems."""

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

    def __post_init__(self):
        super().__post_init__()
        if self.num_examples < 0:
            raise ValueError(f"num_examples={self.num_examples} is negative. Set it to 0 for none.")
        if self.eval_samples is not None and self.eval_samples < 1:
            raise ValueError(f"eval_samples={self.eval_samples} is not positive. Leave it out to use all problems.")


def main(arguments: list[str]) -> None:
    """Parses the options, trains, and saves what the run leaves behind."""
    args, training_args, model_args = parse(GSM8KArguments, arguments, __doc__)
    if training_args.reward_weights is not None:
        raise ValueError("reward_weights is not used here. Set format_reward_weight instead.")
    check_checkpoint(training_args)
    check_model(model_args, training_args.trust_remote_code)

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
    check_prompts(training_args, len(train_dataset), training_args.world_size)
    held_out = None
    if args.eval_every > 0 or training_args.eval_strategy != "no":
        held_out = load(args.dataset_test_split)
        held_out = held_out.select(range(min(args.eval_samples or len(held_out), len(held_out))))

    reward_funcs = [accuracy_reward]
    if args.format_reward_weight != 0:
        reward_funcs.append(format_reward)
        training_args.reward_weights = [1.0, args.format_reward_weight]

    trainer = make_trainer(args, training_args, model_args, reward_funcs, train_dataset, held_out, tokenizer)
    if args.eval_every > 0:
        trainer.add_callback(GreedyEvaluation(trainer, held_out, args.eval_every))
    part = f"[:{args.eval_samples}]" if args.eval_samples else ""
    run(trainer, args, CardDataset(args.dataset_name, args.dataset_config, args.dataset_test_split + part))


if __name__ == "__main__":
    main(sys.argv[1:])
    # Between CPUs, Gloo's threads end with the last reference to a process group, and need a living interpreter for it
    gc.collect()
