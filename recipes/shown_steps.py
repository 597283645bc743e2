"""
How much of what training gains on the embedded task is one habit: to write the steps before the answer.

    python recipes/shown_steps.py --output_dir runs/shown_steps

makes the task of docs/protocol.md, trains its policy as one of the comparison's runs does (REINFORCE at its tuned
learning rate, nearly on-policy, one of the test seeds), and looks at the solutions of the held-out problems before and
after: how many write their steps, how many are right with and without them, and how many are right if the policy has
to write them, because its first token must not be the mark of the final answer. Leaves `shown_steps.json`. It takes
some ten minutes on one CPU core, and goes on from the policies that the output folder has. With another number of
threads or on another machine rounding may warm-start another policy: `policy` in that file is a hash of its weights.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proma_trl.recipes.frontier import CONFIGS, INSTRUCTIONS, embedded_task, fingerprint
from proma_trl.recipes.frontier_plan import PROTOCOL, REGIMES, Run
from proma_trl.recipes.processes import run_logged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 8  # of a problem
MARK = "####"  # of the final answer
COLUMNS = {
    "steps": "Write steps",
    "right": "Right",
    "right_with_steps": "Right, with steps",
    "right_without_steps": "Right, without",
    "greedy_right": "Greedy, right",
    "forced_right": "Steps forced, right",
    "forced_greedy_right": "Steps forced, greedy, right",
}


def complete(
    policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", questions: Sequence[str], **options: object
) -> list[str]:
    """Solutions of questions, of 32 tokens at most, with options of `generate`."""
    import torch

    prompts = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = policy.generate(**inputs, max_new_tokens=32, **options)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def tally(solutions: Sequence[str], right: Sequence[float]) -> dict[str, float | None]:
    """The share of solutions that write steps, and of those that are right: of all, with and without steps."""
    shown = ["=" in solution for solution in solutions]

    def share(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "steps": share(shown),
        "right": share(right),
        "right_with_steps": share([r for r, steps in zip(right, shown, strict=True) if steps]),
        "right_without_steps": share([r for r, steps in zip(right, shown, strict=True) if not steps]),
    }


def look_at(folder: Path, problems: Sequence[dict[str, str]]) -> dict[str, float | None]:
    """What a saved policy does with problems: sampled at temperature 1, greedily, and where it has to write steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from proma_trl.tools.data import gold_answer
    from proma_trl.tools.rewards import accuracy_reward

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    questions = [problem["question"] for problem in problems]
    answers = [gold_answer(problem["answer"]) for problem in problems]
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": SAMPLES}
    forced = {"begin_suppress_tokens": [tokenizer.convert_tokens_to_ids(MARK)]}

    def found(samples: int, **options: object) -> dict[str, float | None]:
        set_seed(0)
        solutions = complete(policy, tokenizer, questions, **options)
        return tally(solutions, accuracy_reward(solutions, [answer for answer in answers for _ in range(samples)]))

    return {
        **found(SAMPLES, **sampled),
        "greedy_steps": (greedy := found(1, do_sample=False))["steps"],
        "greedy_right": greedy["right"],
        "forced_right": found(SAMPLES, **sampled, **forced)["right"],
        "forced_greedy_right": found(1, do_sample=False, **forced)["right"],
    }


def explained(before: dict[str, float | None], after: dict[str, float | None]) -> float:
    """The share of right samples if training had changed nothing but how often steps are written."""
    with_steps, without = before["right_with_steps"] or 0.0, before["right_without_steps"] or 0.0
    return after["steps"] * with_steps + (1 - after["steps"]) * without


def table(policies: dict[str, dict[str, float | None]]) -> str:
    """The figures as Markdown."""
    header = ["Policy", *COLUMNS.values()]
    rows = [
        [name, *("" if found[column] is None else f"{found[column]:.3f}" for column in COLUMNS)]
        for name, found in policies.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def main(arguments: list[str]) -> None:
    """Parses the options, makes the policies that are missing, and looks at them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/shown_steps"))
    parser.add_argument("--seed", type=int, default=PROTOCOL.blocks[0].test_seeds[0])
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    os.environ |= INSTRUCTIONS | {"HF_HUB_OFFLINE": "1"}
    source = embedded_task(args.output_dir / "task")
    policy, problems = Path(source[1]), Path(source[3])
    run = Run("on_policy", "reinforce", rate=-18, value=0, seed=args.seed)
    trained = args.output_dir / f"reinforce_seed_{args.seed}"
    if not (trained / "model.safetensors").is_file():
        print(f"Training with {' '.join(run.options())}.", flush=True)
        config = ["--config", str(CONFIGS / REGIMES[run.regime].config), *source, "--output_dir", str(trained)]
        recipe = str(Path(__file__).with_name("gsm8k.py"))
        run_logged([sys.executable, recipe, *config, *run.options()], trained.with_suffix(".log"))
    rows = [json.loads(line) for line in (problems / "test.jsonl").read_text().splitlines()]
    found = {"before": look_at(policy, rows), "after": look_at(trained, rows)}
    summary = {"policy": fingerprint(policy), "run": run.name, **found, "explained": explained(**found)}
    (args.output_dir / "shown_steps.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(found))
    print(f"\nRight, had training changed how often steps are written alone: {summary['explained']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
