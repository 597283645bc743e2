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
