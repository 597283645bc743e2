"""What a trainer leaves on the model: what TRL's leaves, whenever it does not train."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support.harness import make_model, make_trainer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

METHODS = {
    "proma": {},
    "one sequence": {"per_device_train_batch_size": 1, "generation_batch_size": 4},
    "isopo": {"projection": "none", "isopo": "natural"},
    "intra": {"projection": "none", "intra_dim": 2},
    "both": {"intra_dim": 2},
}


def hooks(model):
    """All hooks on modules and parameters."""
    of_modules = {
        name: [(kind, len(value)) for kind, value in vars(module).items() if kind.endswith("_hooks") and value]
        for name, module in model.named_modules()
    }
    of_parameters = {name: len(p._backward_hooks or ()) for name, p in model.named_parameters()}
    return of_modules, of_parameters


def attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("method", METHODS)
def test_after_training_the_model_is_as_grpo_leaves_it(method, tmp_path):
    grpo = make_trainer(tmp_path, None, GRPOTrainer, GRPOConfig)
    trainer = make_trainer(tmp_path, **METHODS[method])
    assert hooks(trainer.model) == hooks(grpo.model)
    pickle.dumps(trainer.model)
    grpo.train()
    trainer.train()
    assert hooks(trainer.model) == hooks(grpo.model) and attributes(trainer.model) == attributes(grpo.model)
    again = pickle.loads(pickle.dumps(trainer.model))
    copied = copy.deepcopy(trainer.model)
    torch.save(trainer.model, tmp_path / "model.pt")
    for name, param in trainer.model.named_parameters():
        assert torch.equal(again.get_parameter(name), param) and torch.equal(copied.get_parameter(name), param)
    accumulation, model = weakref.ref(trainer.accumulation), trainer.model
    del trainer
    gc.collect()
    assert accumulation() is None and hooks(model) == hooks(grpo.model)


def test_a_trainer_that_never_trained_leaves_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    model, accumulation = trainer.model, weakref.ref(trainer.accumulation)
    del trainer
    gc.collect()
    grpo = make_trainer(tmp_path, None, GRPOTrainer, GRPOConfig)
    assert accumulation() is None and hooks(model) == hooks(grpo.model)


class Interrupt(TrainerCallback):
    """Interrupts training in the second microbatch of the second step."""

    def __init__(self, error):
        self.error, self.seen = error, 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen += 1
        if self.seen == 3:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("reward")])
def test_an_exception_leaves_no_hooks(error, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Interrupt(error)], max_steps=2)
    before = hooks(trainer.model)
    with pytest.raises(type(error)):
        trainer.train()
    assert hooks(trainer.model) == before and trainer.accumulation._index == 0
    pickle.dumps(trainer.model)
    trainer.train()
    assert hooks(trainer.model) == before


@pytest.mark.parametrize("method", METHODS)
def test_training_again_goes_on_as_before(method, tmp_path):
    """The rule's state and the count of steps stay: two runs of one trainer, with and without hooks taken off."""
    model = make_model()
    results = []
    for keeps in (False, True):
        torch.manual_seed(3)
        trainer = make_trainer(tmp_path, copy.deepcopy(model), num_train_epochs=1, max_steps=1, **METHODS[method])
        if keeps:
            trainer.accumulation.detach = lambda: None
        for _ in range(2):
            trainer.train()
            states = copy.deepcopy(trainer.accumulation.state_dict())
        results.append((states, trainer.accumulation._step, [p.detach().clone() for p in trainer.model.parameters()]))
        trainer.accumulation.__dict__.pop("detach", None)
    (found, step, params), (want, other, wanted) = results
    assert found == want and step == other == 2
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


def test_trainers_on_one_model_one_after_another(tmp_path):
    first = make_trainer(tmp_path)
    before = hooks(first.model)
    second = make_trainer(tmp_path, first.model, projection="none", intra_dim=2)
    for trainer in (first, second, first):
        trainer.train()
        assert hooks(trainer.model) == before
        assert trainer.state.log_history[-2].keys() & {"projection/norm_ratio", "intra/norm_ratio"}


def test_evaluation_puts_no_hooks_on(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    before = hooks(trainer.model)
    for _ in range(2):
        assert "eval_loss" in trainer.evaluate()
        assert hooks(trainer.model) == before
        trainer.train()
