"""
The embedded task: word problems in the form of GSM8K, and a small policy that half knows how to solve them.

    python recipes/word_problems.py --output_dir runs/task --level easy

leaves the problems as `problems/{train,test}.jsonl` and the policy as `warm_start`. Everything is generated, so it
runs without network and within a minute on two CPU cores. The policy has the Qwen3 architecture and a tokenizer of its
own, and is warm-started with TRL's SFTTrainer on solutions of which some show their steps and most give only the final
answer. It imitates what it has seen most. Rewards for right final answers alone then teach it to work in steps: only
that gets difficult problems right.
"""

# Torch, transformers and TRL are imported by the functions that need them: whoever only asks for the task, which is
# made in a process of its own, starts at once.
import argparse
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proma_trl.recipes.processes import run_with_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

WARM_START, TRAIN, HELD_OUT = 8000, 4000, 300
STEPS_SHOWN = 0.35  # the share of the warm start's solutions that show their steps
BATCH_SIZE = 64  # of the warm start

NAMES = ["Ann", "Ben", "Carla", "Dev", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Liam"]
THINGS = ["apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps"]


@dataclass(frozen=True)
class Level:
    """How difficult problems are, and how long the small policy's warm start takes on them."""

    largest_number: int
    steps: int
    epochs: float


# On "easy" the small policy only has to find out that steps help; on "hard" it has to get better at them, too. "short"
# is for pretrained models of a hundred million weights.
LEVELS = {
    "easy": Level(largest_number=20, steps=4, epochs=2.5),
    "hard": Level(largest_number=40, steps=4, epochs=4),
    "short": Level(largest_number=18, steps=1, epochs=2.5),
}

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
# The policy reads the question alone: its instruction would be the same for every problem.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_problem(rng: random.Random, largest_number: int, steps_to_take: int) -> dict[str, str]:
    """Returns a word problem in the form of GSM8K, whose answer shows its steps and ends with `#### <number>`."""
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    total = rng.randint(2, max(9, largest_number // 4))
    sentences, steps = [f"{name} has {total} {things}."], []
    while len(steps) < steps_to_take:
        amount = rng.randint(2, max(6, largest_number // 5))
        sentence, operation, result = rng.choice(
            [
                (f"{friend} brings {amount} more.", f"+ {amount}", total + amount),
                (f"{name} gives {amount} to {friend}.", f"- {amount}", total - amount),
                (f"Then {name} has twice as many.", "* 2", total * 2),
            ]
        )
        if 0 <= result <= largest_number:
            sentences.append(sentence)
            steps.append(f"{total} {operation} = {result}")
            total = result
    question = " ".join([*sentences, f"How many {things} does {name} have now?"])
    return {"question": question, "answer": "\n".join([*steps, f"#### {total}"])}


def make_problems(count: int, seed: int, level: Level = LEVELS["easy"]) -> list[dict[str, str]]:
    """Returns as many problems, no two of which have the same question."""
    rng = random.Random(seed)
    problems = {}
    while len(problems) < count:
        problem = make_problem(rng, level.largest_number, level.steps)
        problems[problem["question"]] = problem
    return list(problems.values())


def make_tokenizer(problems: list[dict[str, str]]) -> "PreTrainedTokenizerFast":
    """Returns a tokenizer whose tokens are the words, marks and numbers of the problems."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), behavior="removed"),
            pre_tokenizers.Split(Regex("[.?\n]"), behavior="isolated"),
        ]
    )
    texts = [text for problem in problems for text in problem.values()]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = [*SPECIAL_TOKENS, *sorted(words)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_policy(tokenizer: "PreTrainedTokenizerFast") -> "Qwen3ForCausalLM":
    """Returns a policy of the Qwen3 architecture with half a million random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def warm_start_steps(level: Level) -> int:
    """The optimizer steps of a level's warm start."""
    return math.ceil(level.epochs * math.ceil(WARM_START / BATCH_SIZE))


def warm_start(problems: list[dict[str, str]], folder: Path, seed: int, epochs: float) -> None:
    """
    Trains a new policy to imitate solutions, most of which hide their steps, and saves it with its tokenizer and
    `metrics.jsonl`.
    """
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from proma_trl.tools.callbacks import JSONLMetrics
    from proma_trl.tools.data import build_prompt
    from proma_trl.trainer.trl_internals import CHECKPOINTING

    tokenizer = make_tokenizer(problems)
    set_seed(seed)
    policy = make_policy(tokenizer)
    rng = random.Random(seed)
    rows = []
    for problem in problems:
        solution = problem["answer"]
        if rng.random() >= STEPS_SHOWN:
            solution = solution.splitlines()[-1]
        rows.append(
            {
                "prompt": build_prompt(problem["question"], conversational=True),
                "completion": [{"role": "assistant", "content": solution}],
            }
        )
    trainer = SFTTrainer(
        model=policy,
        args=SFTConfig(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            bf16=False,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            report_to="none",
            **{CHECKPOINTING: False},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[JSONLMetrics()],
    )
    trainer.train()
    trainer.save_model()


def write_problems(folder: Path, seed: int, level: str) -> list[dict[str, str]]:
    """Writes a level's problems as `{train,test}.jsonl`; returns others like them, for a warm start."""
    problems = make_problems(WARM_START + TRAIN + HELD_OUT, seed, LEVELS[level])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", problems[WARM_START:-HELD_OUT]), ("test", problems[-HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return problems[:WARM_START]


def write_task(folder: Path, seed: int, level: str = "easy") -> tuple[Path, Path]:
    """
    Generates the task in `folder`, at one of the [`LEVELS`], in a process of its own, whose output goes to
    `warm_start.log` there. A terminal shows its progress in one line.

    Returns:
        `tuple[Path, Path]`: where its problems (`{train,test}.jsonl`) and its policy lie.

    Raises:
        RuntimeError: The process failed. The message has the end of its output.
    """
    data, policy = folder / "problems", folder / "warm_start"
    command = [sys.executable, __file__, "--output_dir", str(folder), "--seed", str(seed), "--level", level]
    # Nothing is needed from the network, and nothing is asked for there
    offline = {"HF_HUB_OFFLINE": "1"}
    run_with_progress(command, policy, warm_start_steps(LEVELS[level]), folder / "warm_start.log", offline)
    return data, policy


def main(arguments: list[str]) -> None:
    """Parses the options, and leaves problems and policy in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--level", default="easy", choices=LEVELS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    problems = write_problems(args.output_dir / "problems", args.seed, args.level)
    warm_start(problems, args.output_dir / "warm_start", args.seed, LEVELS[args.level].epochs)


if __name__ == "__main__":
    main(sys.argv[1:])
