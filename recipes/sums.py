"""
Trains a pretrained language model to add two numbers, with PROMA or one of its baselines.

    python recipes/sums.py --config recipes/configs/sums_smollm2_cpu.yaml --algorithm proma

A prompt is plain text: two sums with their results, then one without, of a number with two digits and one up to 29.
With prompts of some 25 tokens and completions of four, a model of a hundred million weights trains on a CPU in
minutes. A run leaves in `output_dir` what one of recipes/gsm8k.py leaves. `eval_accuracy` is measured on some of the
problems that are held out; after the last step, `eval_final_accuracy` on all of them.
"""

import gc
import random
import sys
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from proma_trl.recipes.training import RunArguments, make_trainer, parse, run
from proma_trl.tools.callbacks import GreedyEvaluation
from proma_trl.tools.data import drop_long_prompts
from proma_trl.tools.rewards import accuracy_reward

# Shown before each problem, and none of the problems
EXAMPLES = ((38, 25), (71, 6))
TRAIN, HELD_OUT = 2000, 500


@dataclass
class SumsArguments(RunArguments):
    """When and on what to evaluate."""

    eval_every: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps between two evaluations with greedy decoding, which also take place before "
            "training; after it, all held-out problems are evaluated on. 0 switches evaluation off."
        },
    )
    eval_samples: int = field(
        default=200, metadata={"help": f"On how many of the {HELD_OUT} problems that are held out."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.eval_samples <= HELD_OUT:
            raise ValueError(f"eval_samples={self.eval_samples} has to be from 1 to {HELD_OUT}.")


def make_sums() -> tuple[Dataset, Dataset]:
    """Returns the problems to train on, and those to hold out, which are others: columns `prompt` and `answer`."""
    sums = [(a, b) for a in range(10, 100) for b in range(2, 30) if (a, b) not in EXAMPLES]
    random.Random(0).shuffle(sums)
    shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in EXAMPLES)
    rows = [{"prompt": f"{shown}{a} + {b} =", "answer": str(a + b)} for a, b in sums[: HELD_OUT + TRAIN]]
    return Dataset.from_list(rows[HELD_OUT:]), Dataset.from_list(rows[:HELD_OUT])


class FinalEvaluation(GreedyEvaluation):
    """Evaluates after the last step alone."""

    metric = "eval_final_accuracy"

    def __init__(self, trainer: GRPOTrainer, dataset: Dataset):
        super().__init__(trainer, dataset, every_steps=sys.maxsize)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Before training, the other evaluation will do."""


def main(arguments: list[str]) -> None:
    """Parses the options, trains, and saves what the run leaves behind."""
    args, training_args, model_args = parse(SumsArguments, arguments, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        padding_side="left",
    )
    train_dataset, held_out = make_sums()
    if args.max_prompt_length is not None:
        train_dataset = drop_long_prompts(train_dataset, tokenizer, args.max_prompt_length)
    trainer = make_trainer(args, training_args, model_args, [accuracy_reward], train_dataset, None, tokenizer)
    if args.eval_every > 0:
        trainer.add_callback(GreedyEvaluation(trainer, held_out.select(range(args.eval_samples)), args.eval_every))
        trainer.add_callback(FinalEvaluation(trainer, held_out))
    run(trainer, args)


if __name__ == "__main__":
    main(sys.argv[1:])
    # Between CPUs, Gloo's threads end with the last reference to a process group, and need a living interpreter for it
    gc.collect()
