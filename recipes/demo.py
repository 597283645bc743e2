"""
PROMA in minutes on two CPU cores, without network or GPU: a small policy learns to work problems out step by step.

    python recipes/demo.py

1. Word problems in the form of GSM8K are generated: some for a warm start, others for training, and others held out.
2. A small policy of the Qwen3 architecture is built, with its own tokenizer, and warm-started with TRL's SFTTrainer on
   solutions of which some show their steps and most give only the final answer. It imitates what it has seen most.
3. `recipes/gsm8k.py` trains it with PROMA on right final answers alone, with the settings of
   `recipes/configs/demo_cpu.yaml`. Only working in steps gets difficult problems right, so that is what it turns to.

It ends with a table of the accuracy on the held-out problems, and fails if that has not risen by 10 points.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from proma_trl.callbacks import ACCURACY
from proma_trl.data import build_prompt

RECIPES = Path(__file__).parent
WARM_START, TRAIN, HELD_OUT = 8000, 4000, 300
STEPS_SHOWN = 0.35  # the share of the warm start's solutions that show their steps
REQUIRED_RISE = 0.10

NAMES = ["Ann", "Ben", "Carla", "Dev", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Liam"]
THINGS = ["apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps"]
LARGEST_NUMBER = 20

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
# The policy reads the question alone: its instruction would be the same for every problem.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_problem(rng: random.Random) -> dict[str, str]:
    """Returns a word problem in the form of GSM8K, whose answer shows four steps and ends with `#### <number>`."""
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    total = rng.randint(2, 9)
    sentences, steps = [f"{name} has {total} {things}."], []
    while len(steps) < 4:
        amount = rng.randint(2, 6)
        sentence, operation, result = rng.choice(
            [
                (f"{friend} brings {amount} more.", f"+ {amount}", total + amount),
                (f"{name} gives {amount} to {friend}.", f"- {amount}", total - amount),
                (f"Then {name} has twice as many.", "* 2", total * 2),
            ]
        )
        if 0 <= result <= LARGEST_NUMBER:
            sentences.append(sentence)
            steps.append(f"{total} {operation} = {result}")
            total = result
    question = " ".join([*sentences, f"How many {things} does {name} have now?"])
    return {"question": question, "answer": "\n".join([*steps, f"#### {total}"])}


def make_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Returns as many problems, no two of which have the same question."""
    rng = random.Random(seed)
    problems = {}
    while len(problems) < count:
        problem = make_problem(rng)
        problems[problem["question"]] = problem
    return list(problems.values())


def make_tokenizer(problems: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are the words, marks and numbers of the problems."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), behavior="removed"),
            pre_tokenizers.Split(Regex("[.?\n]"), behavior="isolated"),
        ]
    )
    texts = [text for problem in problems for text in problem.values()]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    numbers = {str(number) for number in range(LARGEST_NUMBER + 1)}
    vocabulary = [*SPECIAL_TOKENS, *sorted(words | numbers)]
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


def make_policy(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Returns a policy of the Qwen3 architecture with half a million random weights."""
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


def warm_start(problems: list[dict[str, str]], folder: Path, seed: int) -> None:
    """Trains a new policy to imitate solutions, most of which hide their steps, and saves it with its tokenizer."""
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
            num_train_epochs=2.5,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def train(folder: Path, policy: Path, problems: Path, algorithm: str, seed: int) -> tuple[float, float]:
    """Runs the recipe and returns the accuracy on the held-out problems before and after."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", str(RECIPES / "gsm8k.py")]
    command += ["--config", str(RECIPES / "configs" / "demo_cpu.yaml"), "--algorithm", algorithm]
    command += ["--model_name_or_path", str(policy), "--dataset_name", str(problems)]
    command += ["--output_dir", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracies = [record[ACCURACY] for record in records if ACCURACY in record]
    return accuracies[0], accuracies[-1]


def main() -> None:
    """Makes the problems and the policy, trains it, and shows what that has changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="proma", choices=["proma", "reinforce", "grpo"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    # Nothing is needed from the network, and nothing is asked for there.
    os.environ["HF_HUB_OFFLINE"] = "1"

    print(f"1/3 Generating {WARM_START + TRAIN + HELD_OUT} problems.", flush=True)
    problems = make_problems(WARM_START + TRAIN + HELD_OUT, args.seed)
    folder = args.output_dir / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", problems[WARM_START:-HELD_OUT]), ("test", problems[-HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"    {problems[0]['question']}\n    {problems[0]['answer']!r}")

    print("2/3 Warm-starting a small policy with SFTTrainer.", flush=True)
    start = time.perf_counter()
    warm_start(problems[:WARM_START], args.output_dir / "warm_start", args.seed)
    warm_start_seconds = time.perf_counter() - start

    print(f"3/3 Training it with {args.algorithm}.", flush=True)
    start = time.perf_counter()
    policy, run = args.output_dir / "warm_start", args.output_dir / args.algorithm
    before, after = train(run, policy, folder, args.algorithm, args.seed)
    train_seconds = time.perf_counter() - start

    print(f"\nGreedy accuracy on {HELD_OUT} held-out problems")
    print(f"{'':24}{'accuracy':>10}{'seconds':>10}")
    print(f"{'after the warm start':24}{before:>10.1%}{warm_start_seconds:>10.0f}")
    print(f"{'after ' + args.algorithm:24}{after:>10.1%}{train_seconds:>10.0f}")
    print(f"{'rise':24}{100 * (after - before):>+8.1f} points")
    if after - before < REQUIRED_RISE:
        sys.exit(f"demo: the accuracy was to rise by {100 * REQUIRED_RISE:.0f} points or more")


if __name__ == "__main__":
    main()
