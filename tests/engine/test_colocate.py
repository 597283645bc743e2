"""PROMATrainer on completions of a real vLLM engine in its own process."""

import statistics

import pytest
import torch
from support import harness
from transformers import AutoModelForCausalLM, TrainerCallback


def digit_reward(completions, **kwargs):
    """The part of a completion that consists of digits."""
    return [sum(c.isdigit() for c in completion) / max(1, len(completion)) for completion in completions]


def make_trainer(policy, output_dir, **kwargs):
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_generations": 8,
        "max_completion_length": 12,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
        "model_init_kwargs": {"dtype": "float32"},
    }
    return harness.make_trainer(output_dir, str(policy), reward_funcs=digit_reward, **{**settings, **kwargs})


def fresh_differences(trainer, reference):
    """
    How far the log-probabilities of fresh completions are from the engine's: the trained policy's, and those of
    `reference`. Means of absolute differences over tokens.
    """
    prompts = [trainer.processing_class(text)["input_ids"] for text in ("ab", "cde", "what is 2?") for _ in range(4)]
    trainer.vllm_generation.sync_weights()
    _, completions, reported, _ = trainer.vllm_generation.generate(prompts, None, 1)
    trained, other = [], []
    for prompt, completion, values in zip(prompts, completions, reported, strict=True):
        ids = torch.tensor([prompt + completion])
        for model, differences in ((trainer.model, trained), (reference, other)):
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            found = log_probs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
            differences += (found - torch.tensor([value[0] for value in values])).abs().tolist()
    return trained, statistics.mean(other)


class Watch(TrainerCallback):
    """After every optimizer step, asks the engine for fresh completions."""

    def __init__(self, reference):
        self.reference, self.found = reference, []

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.model.eval()
        self.found.append(fresh_differences(self.trainer, self.reference))
        self.trainer.model.train()


def test_the_engine_has_the_trainers_weights_after_each_step(policy, tmp_path):
    watch = Watch(AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32))
    trainer = make_trainer(policy, tmp_path, callbacks=[watch], max_steps=4, learning_rate=1e-2)
    watch.trainer = trainer
    synced = []
    original = trainer.vllm_generation.sync_weights
    trainer.vllm_generation.sync_weights = lambda: (synced.append(trainer.state.global_step), original())
    trainer.train()
    assert {0, 1, 2, 3} <= set(synced)
    assert len(watch.found) == 4
    for own, _ in watch.found:
        assert max(own) < 0.05
    # The weights have moved by far more than that
    assert watch.found[-1][1] > 0.2


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_rewards_are_learned(mode, policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, max_steps=30, vllm_importance_sampling_mode=mode)
    trainer.train()
    rewards = [record["reward"] for record in trainer.state.log_history if "reward" in record]
    assert len(rewards) == 30
    assert statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5]) + 0.2
    record = trainer.state.log_history[0]
    assert record["projection/norm_ratio"] > 0
    # Sampler and trainer are the same policy up to rounding, so the correction is close to one
    assert record["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["binary_kl", "topk_tv"])
def test_a_trust_region_is_anchored_on_the_engine(kind, policy, tmp_path):
    """The engine's log-probabilities, of the sampled tokens and of the most probable ones, are the trainer's own."""
    rollouts = harness.StepRecorder()
    settings = {"divergence": kind, "projection": "none", "temperature": 0.8, "max_steps": 2, "learning_rate": 1e-2}
    trainer = rollouts.follow(make_trainer(policy, tmp_path, **settings))
    assert trainer.vllm_generation.logprobs == (20 if kind == "topk_tv" else 0)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    tokens, others, outside = [], [], 0
    for weights, _, microbatches in rollouts.steps:
        model.load_state_dict(weights)
        for inputs in microbatches:
            mask = inputs["completion_mask"].bool()
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1]
            log_probs = (logits / 0.8).log_softmax(-1)
            own = log_probs.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
            tokens += (own - inputs["sampling_per_token_logps"])[mask].abs().tolist()
            if kind == "topk_tv":
                top, known = inputs["sampling_top_ids"].long(), inputs["sampling_top_ids"] >= 0
                found = log_probs.gather(-1, top.clamp(min=0)) - inputs["sampling_top_logps"]
                others += found[known & mask.unsqueeze(-1)].abs().tolist()
                # Twenty others where the sampled token is not one of the twenty
                outside += (known.sum(-1) == 20)[mask].sum().item()
                # No token is twice there, and all are more probable than the rest
                assert not (top == inputs["completion_ids"].unsqueeze(-1))[known].any()
                rest = log_probs.scatter(-1, top.clamp(min=0), -torch.inf)
                rest = rest.scatter(-1, inputs["completion_ids"].unsqueeze(-1), -torch.inf).amax(-1)
                least = inputs["sampling_top_logps"].masked_fill(~known, torch.inf).amin(-1)
                assert (least >= rest - 0.05)[mask].all()
    assert len(tokens) > 200 and max(tokens) < 0.05
    assert (kind == "binary_kl") == (not others)
    if others:
        assert max(others) < 0.05 and 0 < outside < len(tokens)
    records = [record for record in trainer.state.log_history if "reward" in record]
    for record in records:
        assert record["dppo/masked_fraction"] == 0 and record["dppo/missing_fraction"] == 0
        assert record["dppo/divergence/max"] < 0.02
        assert not any(name.startswith("sampling/") for name in record)


@pytest.mark.parametrize("projection", ["none", "iterative"])
def test_rewards_are_learned_in_a_trust_region(projection, policy, tmp_path):
    """Two optimizer steps a generation: the second is off-policy."""
    settings = {"divergence": "topk_tv", "divergence_threshold": 0.04, "steps_per_generation": 8, "max_steps": 30}
    # A policy that is nearly sure of its tokens would amplify the rounding in which engine and trainer differ
    trainer = make_trainer(policy, tmp_path, projection=projection, learning_rate=2e-3, **settings)
    trainer.train()
    records = [record for record in trainer.state.log_history if "dppo/divergence/max" in record]
    assert len(records) == 30
    rewards = [record["reward"] for record in trainer.state.log_history if "reward" in record]
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:3]) + 0.2
    assert max(record["dppo/divergence/max"] for record in records[::2]) < 0.05
    assert any(record["dppo/masked_fraction"] > 0 for record in records[1::2])
