"""An update rule from outside the package: a natural gradient by eigendecomposition, and what it can ask for."""

import copy

import pytest
import torch
from support import oracle
from support.harness import definition, make_args, make_inputs, make_trainer, trainer_gradients
from support.models import tiny_model
from support.sequences import expected, make_batch, objectives

from proma_trl import PROMA, REINFORCE, Chain, ProjectedAccumulation, PROMAConfig, UpdateRule

RIDGE, RATE = 1e-3, 0.1


class NaturalGradient(UpdateRule):
    """`c = (S / k + ridge I)^-1 a`, and how much of `a` is left of it."""

    def coefficients(self, products, advantages):
        values, vectors = torch.linalg.eigh(products.gram / products.num_sequences)
        parts = vectors.mT @ advantages.unsqueeze(-1)
        return (vectors @ (parts / (values + RIDGE).unsqueeze(-1))).squeeze(-1)

    def observe(self, products, advantages):
        return {"natural/longest": self.coefficients(products, advantages).abs().max()}


def natural(name, sequences, advantages):
    """The definition, by an inverse."""
    stacked = torch.stack(sequences)
    return torch.linalg.inv(stacked @ stacked.T / len(stacked) + RIDGE * torch.eye(len(stacked)).double()) @ advantages


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("projects", [False, True])
def test_training_follows_the_definition(projects, k):
    """Two optimizer steps of two microbatches, in float64, so that the second starts where the definition is."""
    model = tiny_model("qwen3-tied", dtype=torch.float64)
    rule = Chain(NaturalGradient(), PROMA()) if projects else NaturalGradient()
    accumulation = ProjectedAccumulation(model, rule, microbatch_size=k)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(2):
        batches = [make_batch(k, seed=2 * step + i) for i in range(2)]
        wanted = expected(model, batches, weigh=natural, method="iterative" if projects else "none")
        before = copy.deepcopy(model.state_dict())
        for ids, mask, weights, advantages in batches:
            with accumulation.capture():
                objective = objectives(model, ids, mask, weights.double())
            accumulation.loss(objective, advantages.double()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found = {name: (before[name] - p.detach()) / RATE for name, p in model.named_parameters()}
        oracle.assert_close(found, wanted, 1e-6)
    metrics = accumulation.pop_metrics()
    assert metrics["natural/longest"] > 0
    assert ("projection/norm_ratio" in metrics) == projects


class NaturalConfig(PROMAConfig):
    def update_rule(self):
        return NaturalGradient()


def test_in_a_trainer(tmp_path):
    trainer = make_trainer(tmp_path, args=make_args(tmp_path, NaturalConfig))
    microbatches = [make_inputs(4, seed) for seed in range(3)]
    found, _ = trainer_gradients(trainer, microbatches)
    model, sequences = definition(trainer, microbatches)
    oracle.assert_close(found, oracle.accumulate(model, sequences, weigh=natural, method="none"))

    trainer.train()
    assert trainer.state.log_history[0]["natural/longest"] > 0
    trainer.create_model_card()
    assert "trained with NaturalGradient" in (tmp_path / "README.md").read_text()


def test_a_rule_is_a_rule():
    with pytest.raises(TypeError, match="`rule` must be an `UpdateRule`"):
        ProjectedAccumulation(tiny_model("gpt2"), "proma", microbatch_size=2)
    with pytest.raises(TypeError, match="abstract"):
        UpdateRule()
    with pytest.raises(ValueError, match="keeps no state"):
        REINFORCE().load_state_dict({"means": {}})


class Remembering(UpdateRule):
    """Counts microbatches in a step, and steps: to see that a rule is told."""

    needs_gram = True

    def __init__(self):
        self.microbatches, self.steps, self.names = 0, [], []

    def coefficients(self, products, advantages):
        return advantages.expand_as(products.norms_sq)

    def observe(self, products, advantages):
        self.microbatches += 1
        assert len(products.names) == len(set(products.names)) == len(products.gram)
        return {}

    def end_step(self, names, average):
        assert average(torch.ones(2)).tolist() == [1, 1]
        self.steps.append(self.microbatches)
        self.names, self.microbatches = list(names), 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state.get("steps", [])


def run_step(accumulation, microbatches):
    model = accumulation.model
    for seed in range(microbatches):
        ids, mask, weights, advantages = make_batch(2, seed)
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        accumulation.loss(objective, advantages).backward()


def test_a_rule_is_told_of_every_microbatch_and_step():
    model = tiny_model("gpt2")
    rule = Remembering()
    accumulation = ProjectedAccumulation(model, Chain(rule, PROMA()), microbatch_size=2)
    for microbatches in (3, 2):
        run_step(accumulation, microbatches)
        model.zero_grad()
    # Without an accelerator, a step is known to be over when the next one begins
    assert rule.steps == [3]
    run_step(accumulation, 1)
    accumulation.end_step()
    assert rule.steps == [3, 2, 1]
    assert rule.names == [name for name, _ in model.named_parameters()]


def test_a_state_is_saved_and_loaded(tmp_path):
    rule, other = Remembering(), Remembering()
    rule.steps = [4, 2]
    model = tiny_model("gpt2")
    saved = ProjectedAccumulation(model, Chain(PROMA(), rule), microbatch_size=2).state_dict()
    torch.save(saved, tmp_path / "rule.pt")
    accumulation = ProjectedAccumulation(model, Chain(PROMA(), other), microbatch_size=2)
    accumulation.load_state_dict(torch.load(tmp_path / "rule.pt", weights_only=True))
    assert other.steps == [4, 2]
