"""Pushing to the Hub, and loading from it: against a stand-in on this machine."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from support.hub import TOKEN, Hub
from support.recipe import ROOT, make_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
IDS = {"proma": "some-team/proma-sums", "grpo": "tester/grpo-sums"}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The folder of two runs of the recipe that pushed, and what the Hub has then."""
    folder = tmp_path_factory.mktemp("hub")
    settings = make_settings(folder) | {
        "push_to_hub": True,
        "hub_always_push": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "kl_every": 1,
    }
    (folder / "policy" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    proma = {"hub_model_id": IDS["proma"], "hub_strategy": "checkpoint", "steps_per_generation": 4}
    grpo = {"algorithm": "grpo", "hub_model_id": "grpo-sums", "hub_private_repo": True}
    for name, own in (("proma", proma), ("grpo", grpo)):
        text = yaml.safe_dump(settings | own | {"output_dir": str(folder / name)})
        (folder / f"{name}.yaml").write_text(text)
    with Hub() as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "0",
            # Large files then travel over HTTP alone.
            "HF_HUB_DISABLE_XET": "1",
        }
        run = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "support" / "hub_user.py"), str(folder)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 0, run.stderr
    return folder, hub


def files_under(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def below(folder, files):
    """The files in a folder of a repository, by their paths there."""
    return {name.removeprefix(folder): content for name, content in files.items() if name.startswith(folder)}


def test_repositories_are_those_named(pushed):
    _, hub = pushed
    assert hub.unanswered == []
    assert {name: repository.private for name, repository in hub.repositories.items()} == {
        IDS["proma"]: False,
        IDS["grpo"]: True,
    }


@pytest.mark.parametrize("algorithm", IDS)
def test_what_is_pushed_is_what_is_saved(pushed, algorithm):
    folder, hub = pushed
    local, received = files_under(folder / algorithm), hub.repositories[IDS[algorithm]].files
    final = {name: content for name, content in local.items() if not name.startswith("checkpoint-")}
    assert {name: content for name, content in received.items() if not name.startswith("last-checkpoint/")} == final
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(final)
    assert "metrics.jsonl" in final and ("figure.png" in final) == HAS_MATPLOTLIB


def test_checkpoints_are_pushed_as_the_strategy_says(pushed):
    folder, hub = pushed
    commits = {name: hub.repositories[name].commits for name in IDS.values()}
    assert [commit.message for commit in commits[IDS["grpo"]]] == [
        "initial commit",
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    ]
    assert not below("last-checkpoint/", commits[IDS["grpo"]][-1].files)

    for step in (1, 2):
        message = f"Training in progress, step {step}, checkpoint"
        (commit,) = (commit for commit in commits[IDS["proma"]] if commit.message == message)
        received, local = below("last-checkpoint/", commit.files), files_under(folder / "proma" / f"checkpoint-{step}")
        assert "trainer_state.json" in local and ("rollout_0.pt" in local) == (step == 1)
        assert received.items() >= local.items()


@pytest.mark.parametrize("algorithm", IDS)
def test_what_is_pushed_can_be_loaded_by_its_name(pushed, algorithm):
    folder, _ = pushed
    loaded, saved = (
        AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in (f"{algorithm}-loaded", algorithm)
    )
    assert set(loaded) == set(saved) and all(torch.equal(loaded[name], saved[name]) for name in saved)
    tokenizers = (AutoTokenizer.from_pretrained(folder / name) for name in (f"{algorithm}-loaded", algorithm))
    prompt = [{"role": "user", "content": "What is 2 + 1?"}]
    first, second = (tokenizer.apply_chat_template(prompt)["input_ids"] for tokenizer in tokenizers)
    assert first == second


@pytest.mark.parametrize("algorithm", IDS)
def test_the_pushed_card_is_the_runs(pushed, algorithm):
    """It passed `ModelCard.validate`, which refuses others."""
    folder, hub = pushed
    refusals = json.loads((folder / "refusals.json").read_text())
    assert "tags" in refusals[algorithm]
    card = ModelCard(hub.repositories[IDS[algorithm]].files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == IDS[algorithm].split("/")[1]
    records = [json.loads(line) for line in (folder / algorithm / "metrics.jsonl").read_text().splitlines()]
    accuracies = [record["eval_accuracy"] for record in records if "eval_accuracy" in record]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", accuracies[-1])
    assert f'model="{IDS[algorithm]}"' in card.text and ("(figure.png)" in card.text) == HAS_MATPLOTLIB
    assert str(folder) not in card.content
