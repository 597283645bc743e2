"""
Uses the installed package as someone does who has nothing else: the command, the recipes, the settings with them.

    python scripts/try_package.py checkout [--demo]

Fails where a part is missing, or where a file of `checkout` is used in place of the installed one. Works in a
temporary folder, without network.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REWARDS = """
def brevity(completions, **kwargs):
    return [-float(len(completion[0]["content"])) for completion in completions]
"""


def check_files(checkout: Path) -> None:
    """The modules, their types and settings are those of the installed package."""
    import proma_trl
    from proma_trl import cli
    from proma_trl.recipes import demo, figure2, gsm8k, train, word_problems

    for module in (proma_trl, cli, demo, figure2, gsm8k, train, word_problems):
        place = Path(module.__file__).resolve()
        assert not place.is_relative_to(checkout) or "site-packages" in place.parts, (
            f"{place} is not the installed one"
        )
    assert (Path(proma_trl.__file__).parent / "py.typed").is_file(), "py.typed is missing"
    assert importlib.metadata.version("proma-trl") == proma_trl.__version__
    for folder in ("configs", "accelerate"):
        kept = sorted(path.stem for path in (checkout / "recipes" / folder).glob("*.yaml"))
        assert cli.names(folder) == kept, f"settings are missing: {set(kept) - set(cli.names(folder))}"
    for name in proma_trl.__all__:
        getattr(proma_trl, name)


def write_inputs(folder: Path) -> None:
    """A policy with random weights, prompts as JSON Lines, and a file with a reward function."""
    from proma_trl.recipes.word_problems import make_policy, make_problems, make_tokenizer

    problems = make_problems(32, seed=0)
    tokenizer = make_tokenizer(problems)
    tokenizer.save_pretrained(folder / "policy")
    make_policy(tokenizer).save_pretrained(folder / "policy")
    rows = [{"prompt": [{"role": "user", "content": problem["question"]}]} for problem in problems]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)


def run(folder: Path, *arguments: str) -> str:
    """Runs `proma-trl` and returns what it printed."""
    command = [str(Path(sys.executable).with_name("proma-trl")), *arguments]
    print("$", " ".join(["proma-trl", *arguments]), flush=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    assert done.returncode == 0, f"exit status {done.returncode}"
    return done.stdout


def main() -> None:
    """Checks the files, then the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the sources that the package was built from")
    parser.add_argument("--demo", action="store_true", help="run the demo, too, which takes minutes")
    arguments = parser.parse_args()
    check_files(arguments.checkout.resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        run(folder, "--version")
        run(folder, "check", "policy", "--microbatch_size", "4")
        options = "--model_name_or_path policy --dataset_name prompts.jsonl --reward_funcs rewards.py:brevity"
        options += " --output_dir run --max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
        options += " --num_generations 4 --max_completion_length 8 --use_cpu --report_to none --logging_steps 1"
        run(folder, "train", "--num_processes", "1", *options.split())
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "rewards/brevity/mean" in record] == [1, 2], records
        assert all(record["projection/norm_ratio"] > 0 for record in records if "reward" in record), records
        assert (folder / "run" / "model.safetensors").is_file() and (folder / "run" / "README.md").is_file()
        if arguments.demo:
            run(folder, "demo")


if __name__ == "__main__":
    main()
