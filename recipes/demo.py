"""
PROMA in minutes on two CPU cores, without network or GPU: a small policy learns to work problems out step by step.

    proma-trl demo

1. `recipes/word_problems.py` generates problems, and warm-starts a policy that mostly answers without showing steps.
2. `recipes/gsm8k.py` trains it with PROMA on right final answers alone, with the settings of
   `recipes/configs/demo_cpu.yaml`. Only working in steps gets difficult problems right, so that is what it turns to.

Both run in processes of their own and leave what they print in log files. The demo ends with the accuracy on the
held-out problems, as a chart (with the extra `figures`) and as a table. It fails if that has not risen by 10 points.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import get_args

import yaml

from proma_trl.recipes.algorithms import Algorithm
from proma_trl.recipes.processes import run_with_progress
from proma_trl.recipes.word_problems import HELD_OUT, write_task
from proma_trl.tools.curves import read_curves

RECIPES = Path(__file__).parent
RECIPE, SETTINGS = RECIPES / "gsm8k.py", RECIPES / "configs" / "demo_cpu.yaml"
ALGORITHMS = get_args(Algorithm)
REQUIRED_RISE = 0.10
WIDTH = 76

# For the training's process. Newer versions of transformers announce the end of a name that TRL still reads.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
}


def train(folder: Path, policy: Path, problems: Path, algorithm: str, seed: int) -> dict[int, float]:
    """
    Runs the recipe, and returns the accuracy on the held-out problems by optimizer step.

    Raises:
        RuntimeError: The recipe failed.
    """
    command = [sys.executable, str(RECIPE), "--config", str(SETTINGS), "--algorithm", algorithm]
    command += ["--model_name_or_path", str(policy), "--dataset_name", str(problems)]
    command += ["--output_dir", str(folder), "--seed", str(seed)]
    steps = yaml.safe_load(SETTINGS.read_text())["max_steps"]
    run_with_progress(command, folder, steps, folder.with_suffix(".log"), ENVIRONMENT)
    return read_curves(folder)["eval_accuracy"]


def draw(accuracy: dict[int, float]) -> str:
    """The accuracy by optimizer step, drawn with characters; without plotext, what it takes."""
    if importlib.util.find_spec("plotext") is None:
        return "For a chart here: pip install 'proma-trl[figures]'"
    import plotext

    steps = list(accuracy)
    plotext.clear_figure()
    plotext.plotsize(WIDTH, 13)
    plotext.theme("clear")
    plotext.title("Accuracy on the held-out problems (%), by optimizer step")
    plotext.plot(steps, [100 * value for value in accuracy.values()], marker="braille")
    plotext.xticks(steps)
    plotext.yticks(range(0, 101, 25))
    plotext.ylim(0, 100)
    return plotext.uncolorize(plotext.build()).rstrip()


def next_commands(policy: Path, problems: Path) -> str:
    """What to try next: commands for a shell in the current folder."""
    # What is installed beside this Python need not be on the PATH
    programs, here = Path(sys.executable).parent, Path.cwd()
    on_path = shutil.which("proma-trl") == str(programs / "proma-trl")
    prefix = "" if on_path else f"{programs.relative_to(here) if programs.is_relative_to(here) else programs}/"
    return f"""\
Try next. Ask the policy a held-out problem:

{prefix}python -c "import json
from transformers import pipeline
problem = json.loads(open('{problems / "test.jsonl"}').readline())
prompt = [{{'role': 'user', 'content': problem['question']}}]
answer = pipeline('text-generation', '{policy}')(prompt)
print(problem['question'], answer[0]['generated_text'][-1]['content'])"

Train a model on prompts of your own, with a reward function of your own:

{prefix}proma-trl train --model_name_or_path Qwen/Qwen3-0.6B \\
    --dataset_name prompts.jsonl --reward_funcs rewards.py:my_reward

Compare PROMA with GRPO and REINFORCE, in under 20 minutes on two cores:

{prefix}proma-trl compare --config figure2_cpu --output_dir runs/figure2"""


def main(arguments: list[str]) -> None:
    """
    Makes the problems and the policy, trains it, and shows what that has changed.

    Raises:
        SystemExit: A phase failed, or the accuracy has not risen by as much as it has to.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="proma", choices=ALGORITHMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    args = parser.parse_args(arguments)
    trained = args.output_dir / args.algorithm
    try:
        print("1/2 A small policy learns from solutions, most of which hide their steps.")
        print(f"    All output: {args.output_dir / 'warm_start.log'}", flush=True)
        start = time.perf_counter()
        problems, policy = write_task(args.output_dir, args.seed)
        warm_start_seconds = time.perf_counter() - start
        problem = json.loads((problems / "train.jsonl").read_text().splitlines()[0])
        print(textwrap.indent(textwrap.fill(problem["question"], WIDTH - 4), "    "))
        print("    " + problem["answer"].replace("\n", " / "))

        print(f"2/2 It is trained on right final answers alone, with {args.algorithm}.")
        print(f"    All output: {trained.with_suffix('.log')}", flush=True)
        start = time.perf_counter()
        accuracy = train(trained, policy, problems, args.algorithm, args.seed)
        train_seconds = time.perf_counter() - start
    except RuntimeError as error:
        sys.exit(f"demo: {error}")

    before, *_, after = accuracy.values()
    print(f"\n{draw(accuracy)}\n\nGreedy accuracy on {HELD_OUT} held-out problems")
    print(f"{'':24}{'accuracy':>10}{'seconds':>10}")
    print(f"{'after the warm start':24}{before:>10.1%}{warm_start_seconds:>10.0f}")
    print(f"{'after ' + args.algorithm:24}{after:>10.1%}{train_seconds:>10.0f}")
    print(f"{'rise':24}{100 * (after - before):>+8.1f} points")
    print(f"\nSaved the policy, its model card and metrics.jsonl in {trained}")
    if after - before < REQUIRED_RISE:
        sys.exit(f"demo: the accuracy was to rise by {100 * REQUIRED_RISE:.0f} points or more")
    print(f"\n{next_commands(trained, problems)}")


if __name__ == "__main__":
    main(sys.argv[1:])
