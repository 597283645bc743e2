"""DPPO in the trainer: its loss and gradients, alone and under a projection, against the float64 definition."""

import copy

import numpy as np
import pytest
import torch
from support import dppo, intra, oracle
from support.harness import (
    TOKENIZER,
    StepRecorder,
    batch_objectives,
    check,
    definition,
    make_args,
    make_model,
    make_trainer,
    token_log_probs,
    trainer_gradients,
    unscored,
)
from trl import GRPOTrainer

from proma_trl import DPPOConfig, DPPOTrainer, PROMAConfig, PROMATrainer, TrustRegion
from proma_trl.trainer import top_log_probs, trl_internals
from proma_trl.trainer.token_trust_region import Statistics
from proma_trl.trainer.trl_internals import replaced
from proma_trl.trust_region.trust_region import DIVERGENCES, MASKS

# Thresholds at which some tokens of the microbatches below are masked, and some are not
LOW = {"binary_tv": 0.01, "binary_kl": 0.02, "topk_tv": 0.3, "topk_kl": 0.3}


def weigh(trainer, microbatches):
    """Adds the definition's token weights, and returns those of real tokens."""
    model, _ = definition(trainer, microbatches)
    model.double()
    for inputs in microbatches:
        inputs["weights"] = dppo.token_weights(trainer.args, model, inputs, trainer.temperature)
    return torch.cat([inputs["weights"][inputs["completion_mask"].bool()] for inputs in microbatches])


def dppo_trainer(folder, architecture="qwen3-tied", k=4, **settings):
    settings = {"divergence": "binary_tv", **settings}
    if settings["divergence"].startswith("topk"):
        settings.setdefault("divergence_top_k", 5)
    settings.setdefault("divergence_threshold", LOW[settings["divergence"]])
    sizes = {"per_device_train_batch_size": k, "generation_batch_size": 8}
    return make_trainer(folder, make_model(architecture), **sizes, **settings)


def assert_the_definitions(trainer, architecture, k):
    top_k = trainer.trust_region.top_k
    microbatches = dppo.stale_inputs(architecture, k, top_k)
    weights = weigh(trainer, microbatches)
    assert (weights == 0).any() and (weights > 0).any()
    check(trainer, microbatches)
    return weights


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradients(kind, mask, cap, projection, tmp_path):
    trainer = dppo_trainer(tmp_path, divergence=kind, divergence_mask=mask, ratio_cap=cap, projection=projection)
    weights = assert_the_definitions(trainer, "qwen3-tied", 4)
    assert (cap is None and weights.max() > 2) or weights.max() == cap


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("architecture", ["llama-untied", "gemma2-softcap", "cohere", "granite", "gptj"])
def test_every_fused_head(architecture, k, tmp_path, monkeypatch):
    """Soft-capping, logit scales, a bias and a temperature; rows of the head in many parts."""
    monkeypatch.setattr(top_log_probs, "_TILE_ELEMENTS", 1000)
    kind = {"divergence": "topk_tv", "divergence_top_k": 7, "divergence_threshold": 0.2}
    assert_the_definitions(dppo_trainer(tmp_path, architecture, k, temperature=0.7, **kind), architecture, k)


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("architecture", ["llama-untied", "gptj"])
def test_a_head_that_is_given_unmasked_positions_only(architecture, projection, tmp_path, monkeypatch):
    """As on CUDA."""
    monkeypatch.setattr(trl_internals._POSITIONS, "_use_triton", lambda device: True)
    settings = {"divergence": "topk_tv", "divergence_threshold": 0.2, "projection": projection}
    assert_the_definitions(dppo_trainer(tmp_path, architecture, 4, **settings), architecture, 4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kind", ["binary_kl", "topk_kl"])
def test_masked_tokens_stay_in_every_normalizer(kind, loss_type, tmp_path):
    assert_the_definitions(dppo_trainer(tmp_path, divergence=kind, loss_type=loss_type), "qwen3-tied", 4)


@pytest.mark.parametrize(
    ("kind", "k", "which", "compact"),
    [
        ("binary_kl", 4, 1, False),
        ("binary_tv", 1, 1, True),
        ("topk_tv", 4, 0, False),
        ("topk_tv", 4, 1, True),
        ("topk_kl", 4, "first row", True),
    ],
)
def test_nothing_scored(kind, k, which, compact, tmp_path, monkeypatch):
    """Also with a head that is given unmasked positions only, as on CUDA."""
    if compact:
        monkeypatch.setattr(trl_internals._POSITIONS, "_use_triton", lambda device: True)
    trainer = dppo_trainer(tmp_path, "llama-untied", k, divergence=kind, projection="none")
    microbatches = unscored(dppo.stale_inputs("llama-untied", k, trainer.trust_region.top_k), which)
    weigh(trainer, microbatches)
    check(trainer, microbatches)
    assert np.isfinite([*trainer.trust_region.pop_metrics("train").values()]).all()


def test_more_tokens_than_the_vocabulary_has(tmp_path):
    kind = {"divergence": "topk_kl", "divergence_top_k": len(TOKENIZER) + 9}
    assert_the_definitions(dppo_trainer(tmp_path, **kind), "qwen3-tied", 4)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"isopo": "norm", "projection": "none"}])
def test_with_other_settings(settings, tmp_path):
    trainer = dppo_trainer(tmp_path, divergence="topk_tv", **settings)
    microbatches = dppo.stale_inputs("qwen3-tied", 4, 5)
    weigh(trainer, microbatches)
    found, _ = trainer_gradients(trainer, microbatches)
    weigher = oracle.Isopo(settings["isopo"]) if "isopo" in settings else None
    method = settings.get("projection", "iterative")
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches), method=method, weigh=weigher))


@pytest.mark.parametrize("projection", ["none", "exact"])
def test_with_intra_proma(projection, tmp_path):
    trainer = dppo_trainer(tmp_path, "llama-untied", divergence="topk_kl", intra_dim=3, projection=projection)
    microbatches = dppo.stale_inputs("llama-untied", 4, 5)
    weights = weigh(trainer, microbatches)
    assert (weights == 0).any()
    found, _ = trainer_gradients(trainer, microbatches)
    batches = [batch_objectives(trainer, inputs, len(microbatches)) for inputs in microbatches]
    model, _ = definition(trainer, microbatches)
    settings = {"dim": 3, "method": projection, "seed": trainer.args.seed, "fused_head": "lm_head.weight"}
    oracle.assert_close(found, intra.accumulate(model, batches, rank=0, step=0, **settings))


def test_other_token_masks_count_once(tmp_path):
    """A tool's tokens are no part of the loss; TRL's mask of off-policy sequences multiplies the weights."""
    trainer = dppo_trainer(tmp_path, off_policy_mask_threshold=-1e9)
    microbatches = dppo.stale_inputs("qwen3-tied", 4, 0)
    weigh(trainer, microbatches)
    for inputs in microbatches:
        inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
        inputs["tool_mask"][:, 2:4] = 0
        inputs["weights"][inputs["advantages"] < 0] = 0  # no divergence is below the threshold
    check(trainer, microbatches)


def test_advantages_of_tokens_without_a_projection(tmp_path):
    """As subclasses of TRL's trainer may give them."""
    trainer = dppo_trainer(tmp_path, projection="none")
    (inputs, *_) = dppo.stale_inputs("qwen3-tied", 4, 0)
    weigh(trainer, [inputs])
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    one = trainer.compute_loss(trainer.model, inputs)
    each = inputs["advantages"].unsqueeze(1).expand_as(inputs["completion_ids"])
    assert trainer.compute_loss(trainer.model, {**inputs, "advantages": each}).item() == pytest.approx(one.item())


# Sampling


def trained(trainer):
    """Trains, and returns what was recorded of the steps."""
    recorder = StepRecorder()
    recorder.follow(trainer).train()
    return recorder


LEARNING = {"optim": "sgd", "learning_rate": 2.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_p": 0.7}, {"top_k": 9}, {"min_p": 0.01}])
@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv"])
def test_the_sampler_is_the_distribution_that_was_sampled_from(kind, settings, tmp_path):
    """`generate`'s log-probabilities, with temperature and truncation, and its most probable tokens."""
    top = {"divergence_top_k": 12} if kind == "topk_tv" else {}
    trainer = make_trainer(tmp_path, divergence=kind, max_completion_length=6, **settings, **top)
    weights = copy.deepcopy(trainer.model.state_dict())
    recorded = trained(trainer)
    model = trainer.pristine
    model.load_state_dict(weights)
    seen, outside = 0, 0
    for inputs in recorded.steps[0][2]:
        for i, mask in enumerate(inputs["completion_mask"].bool()):
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[i : i + 1]
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[i : i + 1]
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=attention).logits[0, -len(mask) - 1 : -1]
            for t in mask.nonzero().flatten().tolist():
                want = truncated(logits[t] / trainer.temperature, settings).log_softmax(-1)
                token = inputs["completion_ids"][i, t]
                assert inputs["sampling_per_token_logps"][i, t] == pytest.approx(want[token].item(), abs=1e-4)
                seen += 1
                if kind == "topk_tv":
                    found = {
                        a: b
                        for a, b in zip(
                            inputs["sampling_top_ids"][i, t].tolist(),
                            inputs["sampling_top_logps"][i, t].tolist(),
                            strict=True,
                        )
                        if a >= 0
                    }
                    values, tokens = want.topk(12)
                    expected = {a: b for a, b in zip(tokens.tolist(), values.tolist(), strict=True) if b > -torch.inf}
                    outside += token.item() not in expected
                    expected.pop(token.item(), None)
                    assert found.keys() == expected.keys()
                    assert all(found[a] == pytest.approx(expected[a], abs=1e-4) for a in found)
    assert seen > 30
    # With a flat distribution, most sampled tokens are not among the most probable
    assert kind == "binary_tv" or settings.get("top_k") or outside > 0
    tensors = [inputs[name] for inputs in recorded.steps[0][2] for name in inputs if "top" in name]
    assert all(x.device.type == "cpu" for x in tensors) and (kind == "topk_tv") == bool(tensors)


def truncated(logits, settings):
    """What `top_p`, `top_k` and `min_p` leave."""
    probs, order = logits.softmax(-1).sort(descending=True)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if "top_p" in settings:
        keep = probs.cumsum(-1) - probs < settings["top_p"]
    if "top_k" in settings:
        keep = torch.arange(len(probs)) < settings["top_k"]
    if "min_p" in settings:
        keep = probs >= settings["min_p"] * probs.max()
    return logits.masked_fill(~torch.zeros_like(keep).scatter(0, order, keep), -torch.inf)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_on_policy_nothing_is_masked_and_the_gradient_is_reinforces(kind, tmp_path):
    trainer = make_trainer(tmp_path / "dppo", divergence=kind, projection="none", **LEARNING)
    found = trained(trainer)
    plain = trained(make_trainer(tmp_path / "reinforce", projection="none", **LEARNING))
    ((_, gradients, _),), ((_, want, _),) = found.steps, plain.steps
    for name, gradient in want.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    record = trainer.state.log_history[0]
    assert record["dppo/masked_fraction"] == 0 and record["dppo/missing_fraction"] == 0
    assert record["dppo/divergence/max"] < 1e-5 and record["dppo/ratio/max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_later_steps_on_a_generation_are_the_definitions(kind, projection, tmp_path):
    """Several optimizer steps and passes a generation, with what `generate` sampled."""
    threshold = {"binary_tv": 0.002, "binary_kl": 1e-4, "topk_tv": 0.02, "topk_kl": 1e-3}[kind]
    top = {"divergence_top_k": 6} if kind.startswith("topk") else {}
    steps = {"steps_per_generation": 6, "num_iterations": 2, "max_steps": 4}
    trainer = make_trainer(
        tmp_path, divergence=kind, divergence_threshold=threshold, projection=projection, **steps, **top, **LEARNING
    )
    recorded, masked = trained(trainer), []
    assert len(recorded.steps) == 4
    for weights, found, microbatches in recorded.steps:
        trainer.model.load_state_dict(weights)
        tokens = weigh(trainer, microbatches)
        masked.append((tokens == 0).double().mean().item())
        assert all("old_per_token_logps" not in inputs for inputs in microbatches)
        want = oracle.accumulate(*definition(trainer, microbatches), method=projection)
        oracle.assert_close(found, want, 1e-4)
    logged = [record["dppo/masked_fraction"] for record in trainer.state.log_history if "loss" in record]
    assert logged == pytest.approx(masked, abs=1e-6)
    assert masked[0] == 0 and all(0 < share < 1 for share in masked[1:])


@pytest.mark.parametrize("kind,passes", [(None, 2), ("binary_tv", 1), ("topk_kl", 1)])
def test_the_policy_does_not_run_again_for_log_probabilities(kind, passes, tmp_path):
    """Forward passes over completions: one a microbatch in training, none for an old policy."""
    trainer = make_trainer(tmp_path, divergence=kind, projection="none", steps_per_generation=6, max_steps=2)
    trainer._probe_padding(trainer.model)
    counted = []
    original = trainer.model.forward

    def forward(*args, **kwargs):
        counted.append(kwargs.get("fused_lm_head", False))
        return original(*args, **kwargs)

    trainer.model.forward = forward
    trainer.train()
    assert sum(counted) == passes * 6


def test_resuming_between_two_steps_on_a_generation(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 6, "seed": 3}
    settings |= {"divergence": "topk_tv", "divergence_top_k": 4, "divergence_threshold": 0.02, **LEARNING}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert whole.state.log_history[3]["dppo/masked_fraction"] > 0
    kept = torch.load(tmp_path / "whole" / "checkpoint-1" / "rollout_0.pt", weights_only=True)["inputs"][0]
    assert kept["sampling_top_ids"].shape[-1] == 4 and kept["sampling_top_ids"].dtype == torch.int32
    for step in (1, 2):
        resumed = make_trainer(tmp_path / f"resumed-{step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), f"resumed from step {step}: {name}"


@pytest.mark.parametrize("before,after", [(None, "binary_tv"), ("binary_tv", "topk_tv"), ("topk_tv", None)])
def test_resuming_with_another_trust_region_samples_anew(before, after, tmp_path):
    """A rollout lacks what it was not made for."""
    settings = {"steps_per_generation": 6, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, divergence=before, max_steps=1, **settings).train()
    trainer = make_trainer(tmp_path, divergence=after, max_steps=2, **settings)
    generations = []
    original = trainer._generate
    trainer._generate = lambda prompts: generations.append(1) or original(prompts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2 and len(generations) == 1


def test_evaluation_has_metrics_of_its_own(tmp_path):
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["ab", "cd"]})
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "eval_dataset": data}
    trainer = make_trainer(tmp_path, divergence="topk_kl", max_steps=2, **evaluation)
    trainer.train()
    training, evaluated = trainer.state.log_history[0], trainer.state.log_history[1]
    assert "dppo/divergence/mean" in training and "eval_dppo/divergence/mean" not in training
    assert evaluated["eval_dppo/masked_fraction"] == 0 and evaluated["eval_dppo/divergence/max"] < 1e-5


def test_metrics_are_over_all_tokens(tmp_path):
    trainer = dppo_trainer(tmp_path, ratio_cap=1.5)
    microbatches = dppo.stale_inputs("qwen3-tied", 4, 0)
    tokens = []
    model, _ = definition(trainer, microbatches)
    weigh(trainer, microbatches)
    for inputs in microbatches:
        for i in range(4):
            pi = token_log_probs(model, inputs, i).detach()
            for t in inputs["completion_mask"][i].nonzero().flatten().tolist():
                mu, advantage = inputs["sampling_per_token_logps"][i, t].item(), inputs["advantages"][i].item()
                unknown = np.isnan(mu)
                ratio = 1.0 if unknown else np.exp(pi[t].item() - mu)
                distance = 0.0 if unknown else dppo.divergence("binary_tv", mu, pi[t].item())
                tokens.append((advantage, inputs["weights"][i, t].item() == 0, unknown, ratio, distance))
    trainer_gradients(trainer, microbatches)
    metrics = trainer.trust_region.pop_metrics("train")
    masked = {sign: [m for a, m, *_ in tokens if sign in (0, np.sign(a))] for sign in (-1, 0, 1)}
    unknown = sum(x[2] for x in tokens)
    assert unknown == 3
    assert metrics == pytest.approx(
        {
            "dppo/masked_fraction": np.mean(masked[0]),
            "dppo/masked_fraction/positive": np.mean(masked[1]),
            "dppo/masked_fraction/negative": np.mean(masked[-1]),
            "dppo/divergence/mean": sum(x[4] for x in tokens) / (len(tokens) - unknown),
            "dppo/divergence/max": max(x[4] for x in tokens),
            "dppo/ratio/max": max(x[3] for x in tokens),
            "dppo/ratio/capped_fraction": np.mean([x[3] > 1.5 for x in tokens]),
            "dppo/missing_fraction": unknown / len(tokens),
        },
        rel=1e-4,
    )
    assert trainer.trust_region.pop_metrics("train") == {}


# Configuration, trainers and cards


def test_defaults(tmp_path):
    args = make_args(tmp_path, DPPOConfig, gradient_accumulation_steps=1, num_generations=4)
    assert (args.projection, args.divergence, args.trust_region().thresholds) == ("none", "binary_tv", (0.15, 0.15))
    assert DPPOConfig.__dataclass_fields__["gradient_accumulation_steps"].default == 1
    assert make_args(tmp_path).divergence is None and make_args(tmp_path).trust_region() is None


@pytest.mark.parametrize("projection,name", [("none", "DPPO"), ("exact", "PROMA and DPPO")])
def test_the_card_says_and_cites_it(projection, name, tmp_path):
    trainer = make_trainer(
        tmp_path, None, DPPOTrainer, DPPOConfig, projection=projection, divergence_threshold=0.2, ratio_cap=5
    )
    assert (trainer.accumulation is None) == (projection == "none")
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert f"trained with {name}" in card and "@article{qi2026rethinking" in card and "2602.04879" in card
    assert ("2601.10498" in card) == (projection != "none") and "- dppo" in card
    assert "| `divergence` | `'binary_tv'` |" in card and "| `divergence_threshold` | `0.2` |" in card
    assert "| `ratio_cap` | `5` |" in card


def test_proma_without_a_projection_is_dppo(tmp_path):
    settings = {"divergence": "topk_tv", "projection": "none", "max_steps": 2, **LEARNING}
    trainer = make_trainer(tmp_path / "proma", **settings)
    ours = trained(trainer)
    theirs = trained(make_trainer(tmp_path / "dppo", None, DPPOTrainer, DPPOConfig, **settings))
    for (_, a, _), (_, b, _) in zip(ours.steps, theirs.steps, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert trainer._name == "DPPO"


def test_dppo_takes_its_own_configuration(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `DPPOConfig`, got `PROMAConfig`"):
        make_trainer(tmp_path, None, DPPOTrainer, PROMAConfig, divergence="binary_tv")
    with pytest.raises(ValueError, match="`divergence=None` leaves DPPO without its trust region"):
        make_args(tmp_path, DPPOConfig, divergence=None)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"divergence_threshold": 0.2}, "`divergence_threshold=0.2` has no effect without a trust region"),
        ({"divergence_threshold_high": 0.2}, "`divergence_threshold_high=0.2` has no effect without"),
        ({"divergence_top_k": 5}, "`divergence_top_k=5` has no effect without a trust region"),
        ({"divergence_mask": "symmetric"}, "`divergence_mask='symmetric'` has no effect without"),
        ({"ratio_cap": 5.0}, "`ratio_cap=5.0` has no effect without a trust region.*Set `divergence`"),
        ({"divergence": "tv"}, "`divergence` must be one of 'binary_tv', "),
        (
            {"divergence": "binary_tv", "divergence_threshold": 1.5},
            "`divergence_threshold` must be above 0 and at most",
        ),
        ({"divergence": "binary_kl", "divergence_threshold": -1}, "`divergence_threshold` must be a finite number"),
        ({"divergence": "topk_kl", "divergence_top_k": 0}, "`divergence_top_k` must be a whole number of at least 1"),
        (
            {"divergence": "binary_tv", "importance_sampling_level": "sequence"},
            "`importance_sampling_level='sequence'`",
        ),
        (
            {"divergence": "binary_tv", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask"},
            "`vllm_importance_sampling_mode='token_mask'` is not available with `divergence",
        ),
        (
            {"divergence": "binary_tv", "use_vllm": True, "vllm_importance_sampling_clip_max": 5.0},
            "`vllm_importance_sampling_clip_max=5.0` is not available.*`ratio_cap`",
        ),
        (
            {"divergence": "topk_tv", "use_vllm": True, "divergence_top_k": 21},
            "`divergence_top_k=21` is more than vLLM gives.*20 or less",
        ),
        (
            {"divergence": "binary_tv", "use_vllm": True, "generation_kwargs": {"logprobs": 3}},
            "`generation_kwargs` sets `logprobs`",
        ),
        (
            {"divergence": "topk_tv", "use_transformers_continuous_batching": True},
            "`divergence='topk_tv'` is not available with `use_transformers_continuous_batching=True`",
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"divergence_top_k": 5}, "`divergence_top_k=5` has no effect with `divergence='binary_tv'`"),
        ({"top_p": 0.9}, "With `top_p=0.9`, completions are sampled from another distribution"),
        ({"top_k": 50}, "With `top_k=50`, .*DPPO is meant for `top_k=0`"),
        ({"min_p": 0.1}, "With `min_p=0.1`"),
        ({"repetition_penalty": 1.1}, "With `repetition_penalty=1.1`"),
        (
            {"generation_kwargs": {"top_p": 0.9}},
            "With `top_p=0.9` in `generation_kwargs`, completions are sampled from another.*meant for `top_p=1.0`",
        ),
        (
            {"generation_kwargs": {"temperature": 0.5}},
            "With `temperature=0.5` in `generation_kwargs`, .* at `temperature=1.0`.*Set the field `temperature`",
        ),
    ],
)
def test_what_has_no_effect_or_another_one_is_named(settings, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        make_trainer(tmp_path, divergence="binary_tv", **settings)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {"generation_kwargs": {"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.2}},
            "top_k min_p repetition_penalty",
        ),
        (
            {"generation_kwargs": {"typical_p": 0.5, "do_sample": False, "min_length": 4}},
            "do_sample typical_p min_length",
        ),
        (
            {"generation_kwargs": {"suppress_tokens": [7], "sequence_bias": {(7,): 1.0}}},
            "suppress_tokens sequence_bias",
        ),
        ({"top_p": 0.9, "generation_kwargs": {"top_p": 1.0}}, ""),
        ({"temperature": 0.5, "generation_kwargs": {"temperature": 0.5, "max_new_tokens": 3, "top_k": 0}}, ""),
        ({"generation_kwargs": {"typical_p": 1.0, "suppress_tokens": [], "do_sample": True, "min_length": 0}}, ""),
        # What the other sampler does not know
        ({"generation_kwargs": {"presence_penalty": 1.0}, "vllm_structured_outputs_regex": "a*"}, ""),
        (
            {
                "use_vllm": True,
                "generation_kwargs": {"presence_penalty": 1.0, "logit_bias": {7: 1.0}, "min_tokens": 2},
            },
            "presence_penalty min_tokens logit_bias",
        ),
        (
            {"use_vllm": True, "generation_kwargs": {"structured_outputs": {"json": {}}, "seed": 1}},
            "structured_outputs",
        ),
        ({"use_vllm": True, "vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex"),
        ({"use_vllm": True, "generation_kwargs": {"temperature": 0.5}}, "temperature"),
    ],
)
def test_every_way_to_sample_from_another_distribution_is_named(settings, names, tmp_path):
    messages = make_args(tmp_path, divergence="binary_tv", **settings).settings_without_effect()
    assert [message.split("`")[1].split("=")[0] for message in messages] == names.split()
    assert all("sampled from another distribution" in message for message in messages)
    assert make_args(tmp_path, **settings).settings_without_effect() == []


def test_sampling_settings_of_the_models_own(tmp_path, recwarn):
    """`generate` takes from the model what TRL leaves open, and only that."""
    named, largest = [], []
    for own in ({}, {"typical_p": 0.4, "min_p": 0.2, "top_k": 3, "top_p": 0.5, "temperature": 0.3, "do_sample": True}):
        model = make_model()
        model.generation_config.update(**own)
        recwarn.clear()
        trainer = make_trainer(tmp_path, model, divergence="binary_tv")
        found = [str(w.message) for w in recwarn if "sampled from another distribution" in str(w.message)]
        assert all("in the model's `generation_config`, " in message for message in found)
        named.append([message.split("`")[1] for message in found])
        trainer.train()
        largest.append(trainer.state.log_history[0]["dppo/divergence/max"])
    assert named == [[], ["min_p=0.2", "typical_p=0.4"]]
    # Before any update
    assert largest[0] < 1e-4 and largest[1] > 0.01


def test_no_warning_by_default(tmp_path, recwarn):
    make_trainer(tmp_path, None, DPPOTrainer, DPPOConfig)
    assert not [w for w in recwarn if "divergence" in str(w.message)]


def test_messages_name_the_method(tmp_path):
    with pytest.raises(
        ValueError, match=r"`epsilon=0\.3` is not available with DPPO: importance ratios are not clipped"
    ):
        make_args(tmp_path, DPPOConfig, epsilon=0.3)


def test_peft(tmp_path):
    from support.harness import LORA

    trainer = make_trainer(tmp_path, make_model("llama-untied"), peft_config=LORA, divergence="topk_kl", **LEARNING)
    recorded = trained(trainer)
    record = trainer.state.log_history[0]
    assert record["dppo/divergence/max"] < 1e-4 and record["dppo/missing_fraction"] == 0
    ((weights, found, microbatches),) = recorded.steps
    trainer.model.load_state_dict(weights)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches)), 1e-4)


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("change", ["no mask", "another ratio"])
def test_a_loss_that_weighs_tokens_otherwise_is_refused(change, projection, tmp_path, monkeypatch):
    """As that of a TRL version in which it has moved."""
    original = GRPOTrainer._compute_loss

    def other(self, model, inputs):
        if change == "another ratio":
            old = (
                {"old_per_token_logps": inputs["sampling_per_token_logps"]}
                if "sampling_per_token_logps" in inputs
                else {}
            )
            return original(self, model, {**inputs, **old})
        with replaced(self, "off_policy_mask_threshold", None):
            return original(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", other)
    trainer = make_trainer(tmp_path, divergence="binary_tv", projection=projection)
    with pytest.raises(RuntimeError, match="does not weigh tokens as its mask of off-policy sequences says"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_statistics_of_several_ranks():
    """The fractions are over all ranks' tokens, and the maxima are the largest."""

    class Two:
        """A rank beside another one that has seen three times as much, and twice as large numbers."""

        def reduce(self, sums, reduction):
            return 4 * sums

        def gather(self, maxima):
            return torch.cat([maxima, 2 * maxima])

    statistics = Statistics()
    mask = torch.tensor([[True, True], [True, False]])
    found = TrustRegion(ratio_cap=1.5).token_weights(
        torch.ones(2, 1), torch.full((2, 2), -0.1), torch.tensor([[-0.1, -1.0], [torch.nan, -9.0]])
    )
    for _ in range(2):
        statistics.add(found, torch.ones(2, 2), mask)
    assert statistics.pop() == {}
    statistics.reduce(Two())
    metrics = statistics.pop()
    assert metrics["dppo/masked_fraction"] == metrics["dppo/masked_fraction/positive"] == pytest.approx(1 / 3)
    assert metrics["dppo/missing_fraction"] == metrics["dppo/ratio/capped_fraction"] == pytest.approx(1 / 3)
    assert metrics["dppo/divergence/max"] == pytest.approx(2 * (np.exp(-0.1) - np.exp(-1)))
    assert metrics["dppo/divergence/mean"] == pytest.approx((np.exp(-0.1) - np.exp(-1)) / 2)
    assert metrics["dppo/ratio/max"] == pytest.approx(2 * np.exp(0.9))
    assert "dppo/masked_fraction/negative" not in metrics


def test_signatures_of_both_trainers_agree():
    assert DPPOTrainer.__init__ is PROMATrainer.__init__
