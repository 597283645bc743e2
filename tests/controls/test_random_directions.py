"""PROMA with the directions of random other sequences, held against its definition."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support import oracle
from support.harness import GradientRecorder, definition, make_args, make_trainer

from proma_trl import PROMA, InnerProducts
from proma_trl.controls import RandomDirections, RandomDirectionsTrainer


@pytest.mark.parametrize("projection", [PROMA(), PROMA("exact", bound=None), PROMA(bound=0.05, strength=0.5)])
def test_the_rule_is_the_definition(projection):
    torch.manual_seed(0)
    own, others = torch.randn(2, 3, 9, dtype=torch.float64)
    acc, advantages = torch.randn(9, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5]).double()
    both = torch.cat([own, others])
    products = InnerProducts(both @ both.T, both @ acc, acc @ acc)
    # The others' advantages do not count
    found = RandomDirections(projection).coefficients(products, torch.cat([advantages, torch.ones(3)])) @ both
    policy = advantages @ own
    settings = {"method": projection.method, "bound": projection.bound, "strength": projection.strength}
    torch.testing.assert_close(acc + found, oracle.remove(acc, list(others), policy, **settings) + policy)


def test_nothing_accumulated():
    rule = RandomDirections(PROMA())
    advantages = torch.tensor([1.0, 2.0, 3.0, 4.0])
    products = InnerProducts(torch.eye(4))
    torch.testing.assert_close(rule.coefficients(products, advantages), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(rule.policy(products, advantages), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert rule.observe(products, advantages) == {}


def test_a_projection_that_removes_nothing():
    with pytest.raises(ValueError, match="removes nothing"):
        RandomDirections(PROMA(strength=0.0))


def record(trainer):
    """Keeps what the loss is given, and what the control makes of it."""
    seen = []
    original = trainer._with_others

    def with_others(inputs):
        seen.append((dict(inputs), original(inputs)))
        return seen[-1][1]

    trainer._with_others = with_others
    return seen


def row(inputs, i):
    """What tells a sequence from the others."""
    return (*inputs["prompt_ids"][i].tolist(), *inputs["completion_ids"][i].tolist())


@pytest.mark.parametrize("divergence", [None, "binary_tv"])
def test_a_step_of_the_trainer_is_the_definition(divergence, tmp_path):
    recorder = GradientRecorder()
    kwargs = {"steps_per_generation": 6, "max_grad_norm": 0.0, "divergence": divergence}
    trainer = make_trainer(tmp_path, trainer_class=RandomDirectionsTrainer, callbacks=[recorder], **kwargs)
    initial, seen = copy.deepcopy(trainer.model.state_dict()), record(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["projection/norm_ratio"] > 0
    trainer.model.load_state_dict(initial)
    own, both = [inputs for inputs, _ in seen], [inputs for _, inputs in seen]
    assert [len(inputs["advantages"]) for inputs in both] == [8, 8, 8]
    model, policies = definition(trainer, own)
    _, together = definition(trainer, both)
    expected = oracle.accumulate(model, policies, directions=[objectives[4:] for objectives, _ in together])
    oracle.assert_close(recorder.gradients, expected)


@pytest.mark.parametrize("steps_per_generation", [6, 3])
def test_which_sequences_are_drawn(steps_per_generation, tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_class=RandomDirectionsTrainer, steps_per_generation=steps_per_generation, max_steps=2
    )
    seen = record(trainer)
    trainer.train()
    assert len(seen) == 6
    windows = [seen[:3], seen[3:]]
    for i, window in enumerate(windows):
        for inputs, together in window:
            own = {row(inputs, j) for j in range(4)}
            assert [row(together, j) for j in range(4)] == [row(inputs, j) for j in range(4)]
            drawn = {row(together, j) for j in range(4, 8)}
            assert len(drawn) == 4 and not drawn & own
            assert together["advantages"][4:].tolist() == [0.0] * 4
            # Of the rollout's other optimizer step, or, where there is none, of the other microbatches
            rest = windows[1 - i] if steps_per_generation == 6 else [x for x in window if x[0] is not inputs]
            assert drawn <= {row(other, j) for other, _ in rest for j in range(4)}


def test_the_draw_is_a_function_of_seed_and_step(tmp_path):
    draws = []
    for seed in (1, 1, 2):
        trainer = make_trainer(tmp_path, trainer_class=RandomDirectionsTrainer, steps_per_generation=6, seed=seed)
        trainer._buffered_inputs = [{"advantages": torch.zeros(4)}] * 6
        draws.append(trainer._draw(4))
        trainer._step += 1
        draws.append(trainer._draw(4))
    assert draws[:2] == draws[2:4] != draws[4:]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"projection": "none"}, "control of PROMA's projection alone"),
        ({"projection": "none", "intra_dim": 2}, "control of PROMA's projection alone"),
        ({"intra_dim": 2}, "control of PROMA's projection alone"),
        ({"isopo": "norm"}, "control of PROMA's projection alone"),
        ({"loss_type": "bnpo"}, "`loss_type='bnpo'` divides"),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 1}, "no other sequences"),
    ],
)
def test_refusals(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, trainer_class=RandomDirectionsTrainer, **settings)


def test_a_global_scope_on_many_ranks(tmp_path):
    ranks = SimpleNamespace(
        args=make_args(tmp_path, projection_scope="global"), accelerator=SimpleNamespace(num_processes=2)
    )
    with pytest.raises(ValueError, match='`projection_scope="global"` is not available'):
        RandomDirectionsTrainer._new_accumulation(ranks, PROMA(), 4)


def test_images(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=RandomDirectionsTrainer)
    trainer._buffered_inputs = [{"advantages": torch.zeros(4), "pixel_values": torch.zeros(20, 3)}] * 3
    with pytest.raises(ValueError, match="whose rows `pixel_values` holds"):
        trainer._with_others(trainer._buffered_inputs[0])


def test_its_name(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=RandomDirectionsTrainer)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "PROMA with random directions" in card and "control" in card
