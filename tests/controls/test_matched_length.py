"""REINFORCE with the step length of another method."""

import copy

import pytest
import torch
from support.harness import StepRecorder, make_model, make_trainer

from proma_trl import PROMATrainer
from proma_trl.controls import MatchedLengthTrainer
from proma_trl.controls.matched_length import LENGTH_RATIO
from proma_trl.tools.policy_metrics import PolicyMetrics


def updates(trainer):
    """What a trainer's steps change, as one vector."""
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before


@pytest.mark.parametrize("method", [{}, {"projection": "none", "intra_dim": 2}, {"isopo": "norm"}])
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd", "max_grad_norm": 0.0},
        {"optim": "sgd", "max_grad_norm": 1.33},
        {"optim": "adamw_torch", "weight_decay": 0.1},
    ],
)
def test_one_step(settings, method, tmp_path):
    """REINFORCE's direction, the method's length: three trainers that make the same rollout."""
    settings = {**settings, "learning_rate": 1e-3}
    model = make_model()
    made = {}
    for name, trainer_class, own in (
        ("control", MatchedLengthTrainer, method),
        ("method", PROMATrainer, method),
        ("reinforce", PROMATrainer, {"projection": "none"}),
    ):
        trainer = make_trainer(tmp_path, copy.deepcopy(model), trainer_class, **settings, **own)
        made[name] = updates(trainer)
        if name == "control":
            logged = trainer.state.log_history[0][LENGTH_RATIO]
    lengths = {name: update.double().norm() for name, update in made.items()}
    if settings["optim"] == "sgd" and not settings["max_grad_norm"]:  # else, lengths are nearly given in a first step
        assert abs(lengths["method"] / lengths["reinforce"] - 1) > 0.01
    torch.testing.assert_close(lengths["control"], lengths["method"], rtol=1e-3, atol=0)
    cosine = torch.dot(made["control"].double(), made["reinforce"].double()) / (
        lengths["control"] * lengths["reinforce"]
    )
    assert cosine > 1 - 1e-6
    assert logged == pytest.approx((lengths["method"] / lengths["reinforce"]).item(), rel=1e-3)


def test_each_has_an_optimizer_of_its_own(tmp_path):
    """Several steps of AdamW along the control's trajectory: both moments, the schedule and clipping."""
    settings = {"max_steps": 4, "optim": "adamw_torch", "lr_scheduler_type": "linear", "max_grad_norm": 0.5}
    trainer = make_trainer(tmp_path, trainer_class=MatchedLengthTrainer, **settings)
    recorder = StepRecorder()
    methods = []
    match = trainer.callback_handler.callbacks[-1]
    original = match.on_pre_optimizer_step

    def keep(args, state, control, **kwargs):
        methods.append({name: g.clone() for name, g in trainer.method_gradients.items()})
        return original(args, state, control, **kwargs)

    match.on_pre_optimizer_step = keep
    trainer.add_callback(recorder)
    trainer.train()
    trained = dict(trainer.trained())
    weights = [{name: state[name] for name in trained} for state, _, _ in recorder.steps]
    weights.append({name: param.detach() for name, param in trained.items()})

    def replay(gradients):
        """The lengths and directions of AdamW's updates with these gradients, from the control's weights."""
        params = {name: torch.nn.Parameter(weights[0][name].clone()) for name in trained}
        optimizer = torch.optim.AdamW(params.values(), weight_decay=0.0)
        for step, own in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
            for name, param in params.items():
                param.data.copy_(weights[step][name])
                param.grad = own[name].clone()
            yield step, params, optimizer

    methods_updates, own_updates = [], []
    for gradients, made in ((methods, methods_updates), ([g for _, g, _ in recorder.steps], own_updates)):
        for step, params, optimizer in replay(gradients):
            if gradients is methods:
                torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
            optimizer.step()
            made.append(torch.cat([(p.detach() - weights[step][n]).flatten() for n, p in params.items()]))
    assert len(methods_updates) == 4
    for step, (method, own) in enumerate(zip(methods_updates, own_updates, strict=True)):
        found = torch.cat([(weights[step + 1][n] - weights[step][n]).flatten() for n in trained])
        torch.testing.assert_close(found, own * method.norm() / own.norm(), rtol=1e-3, atol=2e-6)


def test_the_method_leaves_no_trace_in_the_metrics(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=MatchedLengthTrainer, max_steps=2, divergence="binary_tv")
    metrics = PolicyMetrics(trainer)
    trainer.add_callback(metrics)
    counted = []
    original = metrics._log_probs
    metrics._log_probs = lambda inputs: counted.append(len(inputs["advantages"])) or original(inputs)
    trainer.train()
    # Before and after each step, and from the initial policy: each sequence once
    assert len(counted) == 3 * 3 * 2 and sum(counted) == 4 * 3 * 3 * 2
    record = trainer.state.log_history[0]
    assert record["kl/local"] > 0 and 0 < record[LENGTH_RATIO] and record["projection/norm_ratio"] > 0
    assert record["dppo/masked_fraction"] >= 0
    assert trainer.state.global_step == 2


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="with these settings that is REINFORCE"):
        make_trainer(tmp_path, trainer_class=MatchedLengthTrainer, projection="none")
    trainer = make_trainer(
        tmp_path, trainer_class=MatchedLengthTrainer, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    again = make_trainer(tmp_path, trainer_class=MatchedLengthTrainer, max_steps=3)
    with pytest.raises(ValueError, match="can't resume"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_its_name(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=MatchedLengthTrainer)
    trainer.create_model_card()
    assert "REINFORCE with the step length of PROMA" in (tmp_path / "README.md").read_text()
