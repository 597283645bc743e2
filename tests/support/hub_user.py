"""
What a user of the Hub does, in a process of its own, as the Hub's address is read once: trains with the recipe, which
pushes, and loads what was pushed.

    HF_ENDPOINT=... HF_TOKEN=... python tests/support/hub_user.py folder

The folder holds `proma.yaml` and `grpo.yaml`. What is loaded from the Hub is saved in it.
"""

import json
import sys
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from proma_trl.recipes import gsm8k

push = Trainer._push_from_checkpoint


def push_and_wait(self, checkpoint_folder: str) -> None:
    """Pushes run beside training, and send what the folder holds by then: on a busy machine, a later step's files."""
    push(self, checkpoint_folder)
    if self.push_in_progress is not None:
        self.push_in_progress.wait_until_done()


Trainer._push_from_checkpoint = push_and_wait


def main(folder: Path) -> None:
    seen = {}
    for algorithm in ("proma", "grpo"):
        config = folder / f"{algorithm}.yaml"
        gsm8k.main(["--config", str(config)])
        name = yaml.safe_load(config.read_text())["hub_model_id"]
        name = name if "/" in name else f"tester/{name}"
        AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder / f"{algorithm}-loaded")
        AutoTokenizer.from_pretrained(name).save_pretrained(folder / f"{algorithm}-loaded")
        card = ModelCard.load(name)
        card.validate()
        card.data.tags = [None]
        try:
            card.validate()
        except ValueError as error:
            seen[algorithm] = str(error)
    (folder / "refusals.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
