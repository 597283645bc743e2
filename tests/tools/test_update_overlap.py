"""The overlap of parameter updates with sequences' gradients, held against its definition."""

import copy

import pytest
import torch
from support.harness import make_inputs, make_trainer, token_log_probs
from trl import GRPOConfig, GRPOTrainer

from proma_trl import PROMATrainer
from proma_trl.controls import MatchedLengthTrainer
from proma_trl.tools.policy_metrics import PolicyMetrics
from proma_trl.tools.update_overlap import UpdateOverlap, squared_cosines


def test_squared_cosines():
    update = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "c": torch.tensor([0.0])}
    gradients = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([-1.0]), "c": torch.tensor([2.0])}
    whole, by_tensor = squared_cosines(update, gradients)
    assert whole == pytest.approx((3 - 4) ** 2 / (25 * 7))
    assert by_tensor == pytest.approx((0.5 + 1 + 0) / 3)
    # A parameter without a gradient is part of the update's length
    assert squared_cosines(update, {"b": torch.tensor([1.0])}) == (pytest.approx(16 / 25), 1.0)
    assert squared_cosines({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == (0.0, 0.0)


@pytest.mark.parametrize("trainer_class", [PROMATrainer, GRPOTrainer, MatchedLengthTrainer])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_what_is_logged_is_the_definition(trainer_class, optim, tmp_path):
    config = {"config_class": GRPOConfig} if trainer_class is GRPOTrainer else {}
    trainer = make_trainer(tmp_path, trainer_class=trainer_class, optim=optim, max_steps=2, **config)
    weights, seen, original = [], [], trainer._compute_loss

    def compute_loss(model, inputs):
        # The control's method comes first, and sees the same
        if not seen or inputs is not seen[-1]:
            if len(seen) % 3 == 0:
                weights.append(copy.deepcopy(trainer.model.state_dict()))
            seen.append(inputs)
        return original(model, inputs)

    trainer._compute_loss = compute_loss
    trainer.add_callback(UpdateOverlap(trainer, every_steps=2))
    trainer.train()
    records = trainer.state.log_history
    assert "update/overlap" not in records[0]
    model = copy.deepcopy(trainer.pristine)
    model.load_state_dict(weights[1])
    model.double()
    after = dict(trainer.model.named_parameters())
    params = dict(model.named_parameters())
    update = {name: after[name].detach().double() - param.detach() for name, param in params.items()}
    found = []
    for inputs in seen[3:]:
        for i in range(len(inputs["advantages"])):
            total = (token_log_probs(model, inputs, i, trainer.temperature) * inputs["completion_mask"][i]).sum()
            gradients = torch.autograd.grad(total, list(params.values()))
            found.append(squared_cosines(update, dict(zip(params, gradients, strict=True))))
    whole, by_tensor = torch.tensor(found).T
    assert len(found) == 12
    expected = {
        "overlap": whole.mean(),
        "tensor_overlap": by_tensor.mean(),
        "last_tensor_overlap": by_tensor[-len(seen[-1]["advantages"]) :].mean(),
    }
    for name, value in expected.items():
        assert records[1][f"update/{name}"] == pytest.approx(value.item(), rel=1e-3), name
    assert "compute_loss" not in vars(trainer)


def test_training_is_not_affected(tmp_path):
    finals = []
    for measured in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, max_steps=2)
        if measured:
            trainer.add_callback(UpdateOverlap(trainer))
        trainer.train()
        finals.append(trainer.model.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_an_exact_unbounded_projection_leaves_no_overlap(tmp_path):
    """Where the last microbatch adds nothing of its own, SGD's update is orthogonal to its sequences."""
    settings = {"projection": "exact", "projection_bound": None, "optim": "sgd", "max_grad_norm": 0.0}
    overlaps = {}
    for projection in ("exact", "none"):
        trainer = make_trainer(tmp_path, **{**settings, "projection": projection})
        inputs = [make_inputs(4, seed) for seed in range(3)]
        inputs[2]["advantages"] = torch.zeros(4)
        trainer._prepare_inputs = lambda batch, given=inputs: given.pop(0)
        trainer.add_callback(UpdateOverlap(trainer))
        trainer.train()
        overlaps[projection] = trainer.state.log_history[0]["update/last_tensor_overlap"]
    assert overlaps["exact"] < 1e-6 < 1e-4 < overlaps["none"]


def test_beside_policy_metrics(tmp_path):
    """In either order, and when training goes on."""
    logged = []
    for classes in ((UpdateOverlap, PolicyMetrics), (PolicyMetrics, UpdateOverlap)):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path)
        for callback in classes:
            trainer.add_callback(callback(trainer))
        for _ in range(2):
            trainer.train()
        names = ("kl/local", "update/overlap", "update/last_tensor_overlap")
        logged.append([record[name] for record in trainer.state.log_history[:1] for name in names])
        assert "compute_loss" not in vars(trainer)
    assert logged[0] == logged[1]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="every_steps=0"):
        UpdateOverlap(make_trainer(tmp_path), every_steps=0)
    with pytest.raises(TypeError, match="UpdateOverlap measures on completions"):
        UpdateOverlap(object())


def test_images_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = trainer.train_dataset.add_column("image", [None] * len(trainer.train_dataset))
    trainer.add_callback(UpdateOverlap(trainer))
    with pytest.raises(ValueError, match="not available for prompts with images"):
        trainer.train()
