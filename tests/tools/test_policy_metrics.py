import math

import pytest
import torch
from datasets import Dataset
from support.harness import LORA, TOKENIZER, make_model
from support.harness import make_trainer as make_any_trainer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from proma_trl import PROMAConfig, PROMATrainer
from proma_trl.tools.policy_metrics import PolicyMetrics, exact_kl, sampled_kl

NAMES = ("kl/local", "kl/lagged", "kl/global")


def random_policy(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_sampled_kl_is_unbiased():
    """Its expectation, summed over the vocabulary, is the divergence."""
    generator = torch.Generator().manual_seed(0)
    p, q = random_policy(generator, 5, 7), random_policy(generator, 5, 7)
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close((p.exp() * sampled_kl(p, q)).sum(-1), expected, check_dtype=False)
    torch.testing.assert_close(exact_kl(p, q), expected, check_dtype=False)


def test_sampled_kl_has_low_variance():
    """The log-ratio, too, is unbiased; for near policies its standard deviation is many times as large."""
    generator = torch.Generator().manual_seed(0)
    p = random_policy(generator, 7)
    q = (p + 0.01 * torch.randn(7, generator=generator, dtype=torch.float64)).log_softmax(-1)
    estimates = sampled_kl(p, q).double()
    naive, own = ((p.exp() * (x - exact_kl(p, q)) ** 2).sum().sqrt() for x in (p - q, estimates))
    assert own < naive / 50
    assert (estimates >= 0).all()


class Recorder(TrainerCallback):
    """Keeps the weights after every optimizer step, and what is logged."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.weights = [self._copy()]
        self.microbatches = []
        self.logs = []
        compute = trainer._compute_loss

        def recorded(model, inputs):
            self.microbatches.append(inputs)
            return compute(model, inputs)

        trainer._compute_loss = recorded

    def _copy(self):
        return {name: param.detach().clone() for name, param in self.trainer.model.named_parameters()}

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(self._copy())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})

    def values(self, name):
        return {record["step"]: record[name] for record in self.logs if name in record}


def make_trainer(output_dir, trainer_class=PROMATrainer, **settings):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3} | settings
    config_class = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}.get(trainer_class, PROMAConfig)
    return make_any_trainer(output_dir, None, trainer_class, config_class, **settings)


def log_probs(trainer, weights, inputs):
    """Log-probabilities of all tokens at the completions' places, in float64."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = torch.func.functional_call(model, weights, kwargs={"input_ids": ids, "attention_mask": mask}).logits
    start = inputs["prompt_ids"].size(1) - 1
    return (logits[:, start:-1].double() / trainer.temperature).log_softmax(-1)


def expected_kl(trainer, weights_p, weights_q, microbatches):
    total = tokens = 0
    for inputs in microbatches:
        p, q = (log_probs(trainer, weights, inputs) for weights in (weights_p, weights_q))
        mask = inputs.get("counted", inputs["completion_mask"]).bool()
        total += (p.exp() * (p - q)).sum(-1)[mask].sum().item()
        tokens += mask.sum().item()
    return total / tokens


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (PROMATrainer, {}),
        (PROMATrainer, {"gradient_checkpointing": True, "temperature": 0.7}),
        (PROMATrainer, {"steps_per_generation": 4}),
        (GRPOTrainer, {"steps_per_generation": 1}),
        (RLOOTrainer, {"beta": 0.0}),
        (PROMATrainer, {"peft_config": LORA}),
    ],
)
def test_exact_values(tmp_path, trainer_class, settings):
    """Against the definition: weights before and after, the sequences of the step, the whole vocabulary."""
    trainer = make_trainer(tmp_path, trainer_class, **settings)
    recorder = Recorder(trainer)
    trainer.add_callback(PolicyMetrics(trainer, lag=2, window=2, exact=True))
    trainer.add_callback(recorder)
    trainer.train()
    lagged = {}
    for step in range(1, 5):
        before, after, own = *recorder.weights[step - 1 : step + 1], recorder.microbatches[2 * step - 2 : 2 * step]
        found = {name: recorder.values(name).get(step) for name in NAMES}
        assert found["kl/local"] == pytest.approx(expected_kl(trainer, before, after, own), rel=1e-3)
        assert found["kl/global"] == pytest.approx(expected_kl(trainer, after, recorder.weights[0], own), rel=1e-3)
        if step < 2:
            assert found["kl/lagged"] is None
        else:
            lagged[step] = expected_kl(trainer, after, recorder.weights[step - 2], own)
            window = [lagged[s] for s in (step - 1, step) if s in lagged]
            assert found["kl/lagged"] == pytest.approx(sum(window) / len(window), rel=1e-3)
        assert math.isfinite(recorder.values("entropy")[step])


@pytest.mark.parametrize("steps_per_generation", [2, 4])
def test_estimates_agree_with_exact_values(tmp_path, steps_per_generation):
    """Over some thousand tokens, on-policy and with two optimizer steps a generation."""
    trainer = make_trainer(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=16,
        steps_per_generation=steps_per_generation,
    )
    recorder = Recorder(trainer)
    trainer.add_callback(PolicyMetrics(trainer))
    trainer.add_callback(recorder)
    trainer.train()
    for name in ("kl/local", "kl/global"):
        estimated = recorder.values(name)
        exact = {}
        for step in estimated:
            before, after, own = *recorder.weights[step - 1 : step + 1], recorder.microbatches[2 * step - 2 : 2 * step]
            policies = (before, after) if name == "kl/local" else (after, recorder.weights[0])
            exact[step] = expected_kl(trainer, *policies, own)
        assert len(exact) == 8
        assert sum(estimated.values()) == pytest.approx(sum(exact.values()), rel=0.1), name


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 4}])
def test_training_is_not_affected(tmp_path, settings):
    trained = []
    for measured in (False, True):
        trainer = make_trainer(tmp_path / str(measured), **settings)
        if measured:
            trainer.add_callback(PolicyMetrics(trainer, lag=1))
        trainer.train()
        trained.append({name: param.detach() for name, param in trainer.model.named_parameters()})
        assert "compute_loss" not in vars(trainer)
    for name, param in trained[0].items():
        assert torch.equal(param, trained[1][name]), name


def test_every_few_steps(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    recorder = Recorder(trainer)
    callback = PolicyMetrics(trainer, every_steps=2, lag=3, initial=False)
    for added in (callback, recorder):
        trainer.add_callback(added)
    kept = []
    trainer.add_callback(kept_snapshots(callback, kept))
    trainer.train()
    assert list(recorder.values("kl/local")) == [2, 4, 6]
    assert list(recorder.values("kl/lagged")) == [4, 6]
    assert not recorder.values("kl/global")
    # Copies of the weights of steps 1, 3 and 5 alone, each dropped once it has been used
    assert kept == [[1], [1], [1, 3], [3], [3, 5], [5]]


def kept_snapshots(callback, kept):
    class Observer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(sorted(callback._snapshots))

    return Observer()


def test_resumed_run_measures_from_its_beginning(tmp_path):
    values = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=2)
        recorder = Recorder(trainer)
        trainer.add_callback(PolicyMetrics(trainer, exact=True))
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=resume)
        values.append(recorder.values("kl/global"))
    assert values[1] == {step: values[0][step] for step in (3, 4)}


def test_tool_results_are_not_counted(tmp_path):
    """Tokens that the policy did not write do not enter: with every other one a tool's, only the rest count."""
    trainer = make_trainer(tmp_path, max_steps=1)
    score = trainer._generate_and_score_completions

    def with_tools(batch):
        output = score(batch)
        output["tool_mask"] = torch.ones_like(output["completion_mask"])
        output["tool_mask"][:, ::2] = 0
        return output

    trainer._generate_and_score_completions = with_tools
    recorder = Recorder(trainer)
    trainer.add_callback(PolicyMetrics(trainer, exact=True))
    trainer.add_callback(recorder)
    trainer.train()
    for inputs in recorder.microbatches:
        inputs["counted"] = inputs["completion_mask"] * inputs["tool_mask"]
    expected = expected_kl(trainer, *recorder.weights, recorder.microbatches)
    assert recorder.values("kl/local")[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sequences", [1, 3])
def test_few_sequences_at_a_time(tmp_path, monkeypatch, sequences):
    values = []
    for limited in (False, True):
        trainer = make_trainer(tmp_path)
        recorder, callback = Recorder(trainer), PolicyMetrics(trainer, exact=True)
        if limited:
            monkeypatch.setattr(callback, "_sequences_at_a_time", lambda length: sequences)
        for added in (callback, recorder):
            trainer.add_callback(added)
        trainer.train()
        values.append([*recorder.values("kl/local").values(), *recorder.values("kl/global").values()])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every_steps": 0}, "every_steps=0"), ({"lag": 0}, "lag=0"), ({"window": -1}, "window=-1")],
)
def test_numbers_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"{message} has to be at least 1"):
        PolicyMetrics(make_trainer(tmp_path), **settings)


def test_needs_a_trainer_that_samples(tmp_path):
    trainer = SFTTrainer(
        make_model(),
        SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 4, "completion": ["c"] * 4}),
        processing_class=TOKENIZER,
    )
    with pytest.raises(TypeError, match=r"needs a trainer that samples them.*not a `SFTTrainer`"):
        PolicyMetrics(trainer)
