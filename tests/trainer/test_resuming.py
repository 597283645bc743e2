"""What a resumed run takes up of a checkpoint, beside what Trainer does: the rollout and the update rule's state."""

import shutil

import pytest
import torch
from support.harness import make_model, make_trainer
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMAConfig, PROMATrainer

# Two optimizer steps a generation, with a checkpoint between them
FIRST = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "seed": 3,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    make_trainer(folder, max_steps=1, **FIRST).train()
    assert (folder / "checkpoint-1" / "rollout_0.pt").is_file()
    return folder / "checkpoint-1"


def resumed(folder, checkpoint, trainer_class=PROMATrainer, config=PROMAConfig, **settings):
    """A run of one more step, and how many times it generated."""
    settings = {**FIRST, "max_steps": 2, "save_strategy": "no", **settings}
    trainer = make_trainer(folder, None, trainer_class, config, **settings)
    generations, original = [], trainer._generate
    trainer._generate = lambda prompts: generations.append(len(prompts)) or original(prompts)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    return trainer, generations


OTHERS = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2, "steps_per_generation": 8}
    | {"gradient_accumulation_steps": 4},
    "steps_per_generation": {"steps_per_generation": 8},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 4},
    "num_iterations": {"num_iterations": 2},
    "num_generations": {"num_generations": 2},
    "max_completion_length": {"max_completion_length": 6},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_rollout_for_other_settings_is_left_out_by_name(name, checkpoint, tmp_path, caplog):
    trainer, generations = resumed(tmp_path, checkpoint, **OTHERS[name])
    args = trainer.args
    assert generations == [args.per_device_train_batch_size * args.steps_per_generation]
    before = FIRST.get(name, {"num_iterations": 1, "num_generations": 4, "max_completion_length": 8}.get(name, 1.0))
    now = OTHERS[name][name]
    assert f"is left out, and completions are generated anew: `{name}` was {before!r} when it was made" in caplog.text
    assert f"`{name}` was {before!r} when it was made, and is {now!r}" in caplog.text


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "steps_per_generation"])
def test_as_grpo_does(name, tmp_path):
    """It generates as often, and as many completions."""
    found = []
    for own, config in ((PROMATrainer, PROMAConfig), (GRPOTrainer, GRPOConfig)):
        folder = tmp_path / own.__name__
        make_trainer(folder, None, own, config, max_steps=1, **FIRST).train()
        found.append(resumed(folder, folder / "checkpoint-1", own, config, **OTHERS[name])[1])
    assert found[0] == found[1] and len(found[0]) == 1


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_rollout_of_an_earlier_version_is_taken_up_where_it_fits(checkpoint, tmp_path, caplog):
    now, generations = resumed(tmp_path / "now", checkpoint)
    assert generations == []
    earlier = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, earlier)
    rollout = torch.load(earlier / "rollout_0.pt", weights_only=True)
    settings = rollout.pop("made_for")
    assert settings["num_processes"] == 1 and settings["divergence"] is None
    torch.save({**rollout, "ranks": 1, "top_k": None}, earlier / "rollout_0.pt")
    then, generations = resumed(tmp_path / "then", earlier)
    assert generations == [] and "left out" not in caplog.text
    assert all(torch.equal(p, weights(now)[name]) for name, p in weights(then).items())
    for name in ("per_device_train_batch_size", "steps_per_generation"):
        _, generations = resumed(tmp_path / name, earlier, **OTHERS[name])
        assert len(generations) == 1 and f"`{name}` was 4 when it was made" in caplog.text
    torch.save({**rollout, "ranks": 2, "top_k": 0}, earlier / "rollout_0.pt")
    _, generations = resumed(tmp_path / "ranks", earlier)
    assert len(generations) == 1 and "`num_processes` was 2 when it was made, and is 1" in caplog.text
    assert "`divergence` was 'binary' when it was made, and is None" in caplog.text


def damaged(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a list":
        torch.save([1, 2], path)
    else:
        saved = torch.load(path, weights_only=True)
        saved.pop("inputs" if "inputs" in saved else "state")
        torch.save(saved, path)


@pytest.mark.parametrize("how", ["cut", "empty", "a list", "a part"])
def test_a_damaged_rollout_is_left_out(how, checkpoint, tmp_path, caplog):
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, copy)
    damaged(copy / "rollout_0.pt", how)
    _, generations = resumed(tmp_path / "then", copy)
    assert len(generations) == 1 and "generated anew: `rollout_0.pt` can't be read (" in caplog.text


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((False, None), "completions are generated anew: process 1 has none"),
        ((False, "`rollout_1.pt` can't be read"), "generated anew: `rollout_1.pt` can't be read"),
        ((True, None), None),
    ],
)
def test_ranks_generate_together(others, said, checkpoint, tmp_path, caplog, monkeypatch):
    """One that went on alone would wait for the others, which gather rewards."""
    monkeypatch.setattr("proma_trl.trainer.proma_trainer.gather_object", lambda own: [*own, others])
    _, generations = resumed(tmp_path, checkpoint)
    assert len(generations) == (said is not None)
    assert said in caplog.text if said else "left out" not in caplog.text


def test_a_rollout_of_another_step_goes_without_saying(checkpoint, tmp_path, caplog):
    """Where checkpoints replace each other, files of an earlier one stay."""
    trainer = make_trainer(tmp_path, **FIRST)
    trainer.state.global_step = 2
    trainer._load_rollout(checkpoint)
    assert trainer._buffered_inputs is None and not caplog.records


@pytest.fixture(scope="module")
def isopo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isopo")
    make_trainer(folder, max_steps=1, isopo="natural", save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def test_the_state_of_another_rule_is_left_out(isopo, tmp_path, caplog):
    def load(model=None, **settings):
        caplog.clear()
        trainer = make_trainer(tmp_path, model, **settings)
        trainer._load_rule(isopo)
        return trainer.accumulation.state_dict()

    assert load(isopo="natural")["0"]["means"] and not caplog.records
    assert load(isopo="fisher") == {}
    assert "holds the running means of `isopo='natural'`: `isopo='fisher'` starts without them" in caplog.text
    assert load(isopo="natural", projection="none") == {} and "holds the state of ISOPO and PROMA" in caplog.text
    model = make_model()
    model.model.norm.weight.requires_grad_(False)
    assert load(model, isopo="natural") == {}
    assert "for other parameters than are trained, in which `model.norm.weight` differs" in caplog.text


@pytest.mark.parametrize("how", ["cut", "empty", "a list", "a part"])
def test_a_damaged_state_is_left_out(how, isopo, tmp_path, caplog):
    shutil.copy(isopo / "update_rule.pt", tmp_path)
    damaged(tmp_path / "update_rule.pt", how)
    trainer = make_trainer(tmp_path, isopo="natural")
    trainer._load_rule(tmp_path)
    assert trainer.accumulation.state_dict() == {}
    assert "`update_rule.pt` in" in caplog.text and "can't be read (" in caplog.text
    assert "ISOPO and PROMA starts without its state" in caplog.text


def test_the_state_of_an_earlier_version_is_taken_up(isopo, tmp_path):
    saved = torch.load(isopo / "update_rule.pt", weights_only=True)
    torch.save({"rule": saved["rule"], "state": saved["state"]}, tmp_path / "update_rule.pt")
    trainer = make_trainer(tmp_path, isopo="natural")
    trainer._load_rule(tmp_path)
    assert trainer.accumulation.state_dict() == saved["state"]
