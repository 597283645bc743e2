"""Completions that another sampler made, or an earlier policy: corrections are token weights, and ratios unclipped."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import dppo, oracle
from support.harness import (
    TOKENIZER,
    StepRecorder,
    definition,
    make_inputs,
    make_model,
    make_trainer,
    token_log_probs,
    trainer_gradients,
)
from transformers import AutoModelForCausalLM

from proma_trl import PROMATrainer
from proma_trl.trainer.sampler_log_probs import check_log_probs
from proma_trl.trainer.sampling import check_server


class Server:
    """What a server says of itself."""

    base_url = "http://localhost:1"

    def __init__(self, model):
        self.served = str(model)

    def get_server_info(self):
        return {"model_config": {"model": self.served, "logprobs_mode": "processed_logprobs"}}


class OtherSampler:
    """
    Stands in for vLLM: draws tokens at random, and reports log-probabilities far from the policy's, some of them
    missing, as vLLM's are where they are NaN.
    """

    def __init__(self, model, **settings):
        self.model, self.settings, self.syncs, self.reported = model, settings, 0, {}
        self.generator = torch.Generator().manual_seed(0)
        self.vllm_client = Server(model.config._name_or_path)

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        completions, log_probs = [], []
        for _ in prompts:
            length = int(torch.randint(3, 8, (), generator=self.generator))
            ids = torch.randint(6, len(TOKENIZER), (length,), generator=self.generator).tolist()
            reported = (-4.6 + torch.randn(length, generator=self.generator)).tolist()
            reported[1] = None
            completions.append(ids)
            log_probs.append([[value] for value in reported])
            self.reported[tuple(ids)] = reported
        return prompts, completions, log_probs, None


@pytest.fixture(autouse=True)
def sampler(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", OtherSampler)


def policy_log_probs(trainer, weights, inputs):
    """`(k, T)`, in float64, from a model without hooks."""
    model = copy.deepcopy(trainer.pristine)
    model.load_state_dict(weights)
    model.double()
    with torch.no_grad():
        return torch.stack([token_log_probs(model, inputs, i) for i in range(len(inputs["advantages"]))])


def expected_ratio(mode, low, high, log_probs, inputs, reported):
    """What corrects for the sampler, `(k, T)`, one sequence and one token at a time."""
    ratio = torch.ones_like(log_probs)
    for i, mask in enumerate(inputs["completion_mask"]):
        ids = inputs["completion_ids"][i][mask.bool()].tolist()
        differences = [
            0.0 if value is None else log_probs[i, t].item() - value for t, value in enumerate(reported[tuple(ids)])
        ]
        if mode.startswith("sequence"):
            differences = [sum(differences)] * len(ids)
        for t, difference in enumerate(differences):
            value = torch.tensor(difference).exp().item()
            if mode.endswith("truncate"):
                value = min(max(value, low or 0.0), high)
            elif not (low or 0.0) <= value <= high:
                value = 0.0
            ratio[i, t] = value
    return ratio


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "mode,low,high",
    [
        ("token_truncate", None, 1.5),
        ("token_mask", 0.5, 1.5),
        ("sequence_truncate", None, 3.0),
        ("sequence_mask", 0.2, 5.0),
    ],
)
def test_corrections_are_token_weights(mode, low, high, k, tmp_path):
    recorder = StepRecorder()
    trainer = recorder.follow(
        make_trainer(
            tmp_path,
            use_vllm=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
            per_device_train_batch_size=k,
            gradient_accumulation_steps=4,
            max_grad_norm=0.0,
        )
    )
    trainer.train()
    ((weights, found, microbatches),) = recorder.steps
    seen = []
    for inputs in microbatches:
        ratio = expected_ratio(
            mode, low, high, policy_log_probs(trainer, weights, inputs), inputs, trainer.vllm_generation.reported
        )
        given = inputs["importance_sampling_ratio"].double().expand_as(ratio)
        torch.testing.assert_close(
            given * inputs["completion_mask"], ratio * inputs["completion_mask"], rtol=1e-3, atol=0
        )
        inputs["weights"] = ratio
        seen += ratio[inputs["completion_mask"].bool()].tolist()
    assert max(seen) > 1.2 and min(seen) < 0.6
    if mode.endswith("mask"):
        assert 0 < seen.count(0.0) < len(seen)
    trainer.model.load_state_dict(weights)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)), 1e-4)


def test_a_microbatch_whose_sequences_are_all_masked_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, use_vllm=True)
    microbatches = [make_inputs(4, seed, off_policy=True) for seed in range(3)]
    for inputs in microbatches:
        inputs["importance_sampling_ratio"] = torch.ones(4, 1)
    microbatches[1]["importance_sampling_ratio"] = torch.zeros(4, 1)
    trainer.current_gradient_accumulation_steps = 3
    trainer.model.train()
    trainer.model.zero_grad()
    before = None
    for i, inputs in enumerate(microbatches):
        trainer.compute_loss(trainer.model, inputs).backward()
        grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        if i == 1:
            assert all(torch.equal(grads[name], before[name]) for name in grads)
        before = grads
    found, _ = trainer_gradients(trainer, microbatches)
    assert any((found[name] != 0).any() for name in found)


@pytest.mark.parametrize("use_vllm", [False, True])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_later_steps_on_a_generation_carry_the_unclipped_ratio(num_iterations, use_vllm, tmp_path):
    """Two optimizer steps a generation, as in the paper, and several passes over it."""
    recorder = StepRecorder()
    trainer = recorder.follow(
        make_trainer(
            tmp_path,
            use_vllm=use_vllm,
            vllm_importance_sampling_correction=False,
            steps_per_generation=6,
            num_iterations=num_iterations,
            max_steps=2 * num_iterations,
            optim="sgd",
            learning_rate=2.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
    )
    trainer.train()
    if use_vllm:
        assert trainer.vllm_generation.syncs == 1
    assert len(recorder.steps) == 2 * num_iterations
    sampled_with, ratios = recorder.steps[0][0], []
    for weights, found, microbatches in recorder.steps:
        for inputs in microbatches:
            mask = inputs["completion_mask"].bool()
            old = policy_log_probs(trainer, sampled_with, inputs)[mask]
            torch.testing.assert_close(inputs["old_per_token_logps"].double()[mask], old, rtol=1e-4, atol=1e-4)
            ratios += (policy_log_probs(trainer, weights, inputs)[mask] - old).exp().tolist()
        trainer.model.load_state_dict(weights)
        oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)), 1e-4)
    assert max(ratios) > 1.3 and min(ratios) < 0.7


def test_settings_reach_the_sampler(tmp_path):
    trainer = make_trainer(
        tmp_path,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://localhost:1",
        vllm_tensor_parallel_size=2,
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.25,
        vllm_importance_sampling_correction=False,
    )
    settings = trainer.vllm_generation.settings
    assert settings["mode"] == "server" and settings["server_base_url"] == "http://localhost:1"
    assert settings["tensor_parallel_size"] == 2 and settings["enable_sleep_mode"]
    assert settings["gpu_memory_utilization"] == 0.25
    assert trainer.vllm_generation.model is trainer.model


def test_weights_reach_the_sampler_after_each_optimizer_step(tmp_path):
    trainer = make_trainer(tmp_path, use_vllm=True, max_steps=3)
    trainer.train()
    assert trainer.vllm_generation.syncs == 3


# Servers


def test_a_server_with_the_trained_model(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    check_server(Server(model.config._name_or_path), model)
    check_server(Server(tmp_path / "model"), model)


def test_a_server_with_another_model(tmp_path):
    model = make_model()
    make_model("llama-untied", num_hidden_layers=3).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"at http://localhost:1 serves another model.*'llama' there and 'qwen3' here"
    ):
        check_server(Server(tmp_path / "other"), model)


def test_a_server_with_a_model_that_is_not_known_here(tmp_path):
    with pytest.warns(UserWarning, match=r"serves 'some/model'.*training will fail when weights are sent"):
        check_server(Server("some/model"), make_model())


@pytest.mark.parametrize("step", [0, 2])
def test_a_server_that_fails_ends_training_after_saving(step, tmp_path):
    trainer = make_trainer(tmp_path, use_vllm=True, vllm_mode="server", max_steps=4)
    original = trainer.vllm_generation.generate

    def generate(**kwargs):
        if trainer.state.global_step == step:
            raise ConnectionError("connection refused")
        return original(**kwargs)

    trainer.vllm_generation.generate = generate
    saved = "No optimizer step had been taken" if step == 0 else f"What was trained is in .*checkpoint-{step}"
    message = rf"(?s)http://localhost:1 failed at step {step}: connection refused.*{saved}.*resume"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    if step > 0:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(a, b)
        trainer.vllm_generation.generate = original
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert trainer.state.global_step == 4


def test_errors_of_a_colocated_engine_are_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, use_vllm=True)

    def generate(*args, **kwargs):
        raise MemoryError("out of memory")

    trainer.vllm_generation.generate = generate
    with pytest.raises(MemoryError, match=r"^out of memory$"):
        trainer.train()


# By default, its cache and its attention mask take half of the machine's memory
CONTINUOUS_BATCHING = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"max_batch_tokens": 64, "num_blocks": 64},
}


def test_continuous_batching(tmp_path):
    """Transformers' own sampler with a paged cache."""
    trainer = make_trainer(tmp_path, max_steps=2, **CONTINUOUS_BATCHING)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[0]["projection/norm_ratio"] > 0


# What a trust region takes from samplers


class TopSampler(OtherSampler):
    """
    Stands in for vLLM as it is asked for K log-probabilities: the K most probable tokens, in the order of their ranks,
    and the sampled one wherever that is.
    """

    def generate(self, prompts, images, num_generations, profiler):
        assert self.logprobs == 3
        completions, log_probs, ids = [], [], []
        for _ in prompts:
            logits = 2 * torch.randn(
                int(torch.randint(3, 8, (), generator=self.generator)), 9, generator=self.generator
            )
            values = logits.log_softmax(-1)
            tokens = values.exp().multinomial(1, generator=self.generator).squeeze(1)
            completions.append([6 + token for token in tokens.tolist()])
            log_probs.append([]), ids.append([])
            for row, token in zip(values, tokens, strict=True):
                ranked = row.argsort(descending=True)
                shown = [*ranked[:3].tolist(), *([] if token in ranked[:3] else [token.item()])]
                log_probs[-1].append([row[i].item() for i in shown])
                ids[-1].append([6 + i for i in shown])
            self.reported[tuple(completions[-1])] = values
        log_probs[0][0] = [None] * len(log_probs[0][0])
        return prompts, completions, log_probs, ids


def test_the_most_probable_tokens_of_an_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", TopSampler)
    recorder = StepRecorder()
    settings = {"divergence": "topk_kl", "divergence_top_k": 3, "max_grad_norm": 0.0}
    trainer = recorder.follow(make_trainer(tmp_path, use_vllm=True, **settings))
    assert not trainer.vllm_importance_sampling_correction
    trainer.train()
    ((weights, found, microbatches),) = recorder.steps
    model = copy.deepcopy(trainer.pristine)
    model.load_state_dict(weights)
    outside, missing = 0, 0
    for inputs in microbatches:
        for i, mask in enumerate(inputs["completion_mask"].bool()):
            values = trainer.vllm_generation.reported[tuple(inputs["completion_ids"][i][mask].tolist())]
            for t, row in enumerate(values):
                token = inputs["completion_ids"][i, t].item() - 6
                own, top = inputs["sampling_per_token_logps"][i, t], inputs["sampling_top_ids"][i, t].tolist()
                log_probs = inputs["sampling_top_logps"][i, t].tolist()
                if own.isnan():
                    missing += 1
                    assert top == [-1, -1, -1]
                    continue
                assert own == pytest.approx(row[token].item())
                want = {6 + j: row[j].item() for j in row.topk(3).indices.tolist()}
                outside += 6 + token not in want
                want.pop(6 + token, None)
                assert {a: b for a, b in zip(top, log_probs, strict=True) if a >= 0} == pytest.approx(want)
        inputs["weights"] = dppo.token_weights(trainer.args, model.double(), inputs)
    assert outside > 5 and missing == 1
    assert trainer.state.log_history[0]["dppo/missing_fraction"] > 0
    assert any((inputs["weights"] == 0).any() for inputs in microbatches)
    trainer.model.load_state_dict(weights)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)), 1e-4)


def test_an_engines_log_probabilities_of_sampled_tokens(tmp_path):
    """The binary divergences ask for no others, and the engine's own ratio is the one that counts."""
    recorder = StepRecorder()
    settings = {"divergence": "binary_tv", "divergence_threshold": 0.02, "max_grad_norm": 0.0}
    trainer = recorder.follow(make_trainer(tmp_path, use_vllm=True, **settings))
    trainer.train()
    assert trainer.vllm_generation.logprobs == 0
    ((weights, found, microbatches),) = recorder.steps
    model = copy.deepcopy(trainer.pristine)
    model.load_state_dict(weights)
    for inputs in microbatches:
        assert not {"importance_sampling_ratio", "old_per_token_logps", "sampling_top_ids"} & inputs.keys()
        assert inputs["sampling_per_token_logps"].isnan().any(1).all()
        inputs["weights"] = dppo.token_weights(trainer.args, model.double(), inputs)
    trainer.model.load_state_dict(weights)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)), 1e-4)


def test_continuous_batching_gives_log_probabilities(tmp_path):
    settings = {"divergence": "binary_tv", "temperature": 0.7, "max_steps": 2}
    trainer = make_trainer(tmp_path, **CONTINUOUS_BATCHING, **settings)
    trainer.train()
    record = trainer.state.log_history[0]
    assert record["dppo/divergence/max"] < 1e-4 and record["dppo/missing_fraction"] == 0
    assert record["dppo/ratio/max"] == pytest.approx(1, abs=1e-3)


def test_a_server_whose_log_probabilities_are_of_another_distribution(tmp_path, monkeypatch):
    raw = {"model_config": {"model": "", "logprobs_mode": "raw_logprobs"}}
    monkeypatch.setattr(Server, "get_server_info", lambda self: raw)
    monkeypatch.setattr("proma_trl.trainer.proma_trainer.check_server", lambda client, model: None)
    with pytest.raises(
        ValueError, match=r"`divergence='binary_kl'`.*--logprobs-mode raw_logprobs.*processed_logprobs"
    ):
        make_trainer(tmp_path, use_vllm=True, vllm_mode="server", divergence="binary_kl")


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 1}])
def test_beams_are_not_drawn_token_by_token(kwargs, tmp_path):
    trainer = make_trainer(tmp_path, divergence="binary_tv", generation_kwargs=kwargs)
    with pytest.raises(RuntimeError, match=r"(?s)not drawn one by one.*`divergence`.*out of `generation_kwargs`"):
        trainer.train()


def rollout(log_probs):
    """A rollout function whose completions are three tokens long."""

    def function(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        values = [[-4.6, -4.6, -4.6] for _ in prompts] if log_probs else None
        return {"prompt_ids": ids, "completion_ids": [[7, 8, 9] for _ in prompts], "logprobs": values}

    return function


def test_a_rollout_functions_log_probabilities(tmp_path):
    trainer = make_trainer(tmp_path, divergence="binary_tv", rollout_func=rollout(True))
    trainer.train()
    assert trainer.state.log_history[0]["dppo/divergence/mean"] > 1e-4


def test_a_rollout_function_without_log_probabilities(tmp_path):
    trainer = make_trainer(tmp_path, divergence="binary_tv", rollout_func=rollout(False))
    with pytest.raises(
        ValueError, match=r"`divergence='binary_tv'` needs .*`rollout_func` returned None as `logprobs`"
    ):
        trainer.train()
    with pytest.raises(ValueError, match=r"`divergence='topk_tv'` needs the most probable tokens.*`rollout_func`"):
        make_trainer(tmp_path, divergence="topk_tv", rollout_func=rollout(True))


TOKENS = [[7, 8, 9], [7, 8]]
KNOWN = [[-1.0, -2.0, -3.0], [-1.0, -2.0]]
MISFITS = [
    (KNOWN[:1], "2 completions and `logprobs` for 1"),
    ([KNOWN[0], [-1.0]], "completion 1 of the rollout has 2 tokens and 1 numbers"),
    ([KNOWN[0], [-1.0, -2.0, 0.0]], "completion 1 of the rollout has 2 tokens and 3 numbers"),
    ([[], KNOWN[1]], "completion 0 of the rollout has 3 tokens and 0 numbers"),
    ([None, KNOWN[1]], "completion 0 of the rollout has 3 tokens and no list of numbers"),
    ([-1.0, -2.0], "completion 0 of the rollout has 3 tokens and no list of numbers"),
    (torch.zeros(2, 3), "completion 1 of the rollout has 2 tokens and 3 numbers"),
    ([KNOWN[0], [[-1.0], [-2.0]]], r"`logprobs` holds \[-1.0\] for token 0 of completion 1 .*no number.*vLLM"),
    ([KNOWN[0], torch.zeros(2, 1)], "for token 0 of completion 1 in the rollout, which is no number"),
    ([KNOWN[0], ["-1", "-2"]], "`logprobs` holds '-1' for token 0 of completion 1"),
    ([[-1.0, 0.3, -3.0], KNOWN[1]], "`logprobs` holds 0.3 for token 1 of completion 0 .*natural logarithms"),
    ([[-1.0, -2.0, float("-inf")], KNOWN[1]], "`logprobs` holds -inf for token 2 of completion 0"),
]


@pytest.mark.parametrize("log_probs,message", MISFITS)
def test_log_probabilities_that_are_not_one_number_a_token_are_refused(log_probs, message):
    with pytest.raises(ValueError, match=f"^`divergence='x'` needs .*{message}.*, or leave it out\\.$"):
        check_log_probs(log_probs, TOKENS, None, "`divergence='x'`", "leave it out")


def test_unknown_ones_tensors_and_those_of_a_tool_are_taken():
    as_arrays = [np.array(values, dtype=np.float32) for values in KNOWN]
    for log_probs, masks in (
        (KNOWN, None),
        ([[None, float("nan"), -3], [-1.0, 1e-4]], None),
        ([torch.tensor(values) for values in KNOWN], None),
        (as_arrays, None),
        ([[-1.0, 5.0, -3.0], KNOWN[1]], [[1, 0, 1], [1]]),
    ):
        check_log_probs(log_probs, TOKENS, masks, "`divergence='x'`", "leave it out")
    with pytest.raises(ValueError, match=r"holds 5\.0 for token 1"):
        check_log_probs([[-1.0, 5.0, -3.0], KNOWN[1]], TOKENS, [[1], [1]], "`divergence='x'`", "leave it out")


def rollout_of(log_probs, **fields):
    def function(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [[7, 8, 9] for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [log_probs for _ in prompts], **fields}

    return function


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "binary_tv"}, r"`divergence='binary_tv'` needs .*3 tokens and 2 .*set `divergence=None`"),
        ({"off_policy_mask_threshold": 0.5}, r"`off_policy_mask_threshold=0.5` needs .*3 tokens and 2 .*leave"),
        ({"use_vllm": True}, r"`vllm_importance_sampling_correction=True` needs .*3 tokens and 2 .*correction=False"),
    ],
)
def test_a_gap_ends_training_at_the_rollout_wherever_it_would_count(settings, message, tmp_path):
    rewarded = []
    settings = {"reward_funcs": lambda completions, **kwargs: rewarded.append(1), **settings}
    trainer = make_trainer(tmp_path, rollout_func=rollout_of([-4.6, -4.6]), **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not rewarded


def test_where_they_do_not_count_they_may_be_anything(tmp_path):
    """As for `GRPOTrainer`."""
    found = []
    for log_probs in ([-4.6, -4.6, -4.6], [0.0]):
        recorder = StepRecorder()
        recorder.follow(make_trainer(tmp_path, rollout_func=rollout_of(log_probs))).train()
        found.append(recorder.steps[0][1])
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_unknown_log_probabilities_of_a_rollout_function_count_as_a_ratio_of_one(tmp_path):
    trainer = make_trainer(tmp_path, divergence="binary_tv", rollout_func=rollout_of([-4.6, None, float("nan")]))
    trainer.train()
    assert trainer.state.log_history[0]["dppo/missing_fraction"] == pytest.approx(2 / 3)


class Adding(PROMATrainer):
    """Changes what TRL makes of completions, as subclasses may."""

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        self.change(rollout)
        return rollout


CHANGES = {
    "old_per_token_logps": (
        lambda x: x.update(old_per_token_logps=x["sampling_per_token_logps"].clone()),
        "The microbatch holds `old_per_token_logps`, .*two ratios. Leave `old_per_token_logps` out",
    ),
    "importance_sampling_ratio": (
        lambda x: x.update(importance_sampling_ratio=torch.ones_like(x["sampling_per_token_logps"])),
        "The microbatch holds `importance_sampling_ratio`, .*two ratios",
    ),
    "none": (
        lambda x: x.pop("sampling_per_token_logps"),
        "The microbatch holds no `sampling_per_token_logps`, and `divergence='binary_tv'` needs",
    ),
    "narrow": (
        lambda x: x.update(sampling_per_token_logps=x["sampling_per_token_logps"][:, :1]),
        r"holds `sampling_per_token_logps` of shape \(4, 1\), .*completions of shape \(4, ",
    ),
}


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_microbatch_with_another_ratio_or_without_the_samplers_is_refused(name, projection, tmp_path):
    """What the loss gets counts, whoever made it."""
    trainer = make_trainer(tmp_path, None, Adding, divergence="binary_tv", projection=projection)
    trainer.change, message = CHANGES[name]
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_another_ratio_of_none_is_none(tmp_path):
    trainer = make_trainer(tmp_path, None, Adding, divergence="binary_tv")
    trainer.change = lambda rollout: rollout.update(old_per_token_logps=None)
    trainer.train()
    assert trainer.state.log_history[0]["dppo/ratio/max"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("use_vllm", [False, True])
def test_turns_with_tools(use_vllm, tmp_path, monkeypatch):
    """A tool's tokens come between the sampled ones of two turns; each keeps its own log-probabilities."""
    if use_vllm:
        monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", PolicySampler)
    calls = iter(range(1000))

    def parse(tokenizer, ids, **kwargs):
        message = {"role": "assistant", "content": tokenizer.decode(ids)}
        if next(calls) % 2:
            return message
        return {**message, "tool_calls": [{"type": "function", "function": {"name": "tool", "arguments": {}}}]}

    def tool():
        """A tool."""
        return "result"

    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", parse)
    monkeypatch.setattr(TOKENIZER, "response_template", "any", raising=False)
    settings = {"divergence": "topk_kl", "divergence_top_k": 4, "max_completion_length": 14, "use_vllm": use_vllm}
    recorder = StepRecorder()
    trainer = recorder.follow(make_trainer(tmp_path, reward_funcs=length_reward, **settings))
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}
    )
    trainer.tools = trainer._standalone_tools = [tool]
    trainer.max_tool_calling_iterations = 1
    trainer._get_tool_suffix_ids = lambda messages: [10, 11, 12]
    if not use_vllm:
        trainer.generation_config.max_new_tokens = 5
    trainer.train()
    ((_, _, microbatches),) = recorder.steps
    tools = 0
    for inputs in microbatches:
        for mask, real, top in zip(
            inputs["tool_mask"], inputs["completion_mask"], inputs["sampling_top_ids"], strict=True
        ):
            tools += ((mask == 0) & (real == 1)).sum().item()
            assert (top[mask == 0] == -1).all() and (top[(mask == 1) & (real == 1)] >= 0).any(-1).all()
    assert tools >= 12
    record = trainer.state.log_history[0]
    assert record["dppo/missing_fraction"] == 0 and record["dppo/divergence/max"] < 1e-4
    assert record["dppo/ratio/max"] == pytest.approx(1, abs=1e-3)


def length_reward(completions, **kwargs):
    return [float(len(completion[0]["content"])) + i for i, completion in enumerate(completions)]


class PolicySampler(OtherSampler):
    """Stands in for an engine that has the policy's weights."""

    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=512)))

    def generate(self, prompts, images, num_generations, profiler):
        completions, log_probs, ids = [], [], []
        for prompt in prompts:
            context = list(prompt)
            log_probs.append([]), ids.append([])
            for _ in range(4):
                with torch.no_grad():
                    row = self.model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)
                context.append(row.exp().multinomial(1, generator=self.generator).item())
                shown = row.topk(self.logprobs).indices.tolist()
                shown += [] if context[-1] in shown else [context[-1]]
                ids[-1].append(shown)
                log_probs[-1].append(row[shown].tolist())
            completions.append(context[len(prompt) :])
        return prompts, completions, log_probs, ids
