"""Trainers on tiny models, microbatches as TRL hands them to the loss, and the gradient that TRL's loss defines."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from proma_trl import PROMAConfig, PROMATrainer
from support import oracle
from support.models import tiny_model
from support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
# Adapters that are no zeros
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
# On one parameter of a mixture's experts: which of two adapters is around the other differs between processes
LORA_ON_EXPERTS = LoraConfig(
    r=4,
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj"],
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)


def lora_config(architecture: str) -> LoraConfig:
    """The adapters of a case on several ranks."""
    return LORA_ON_EXPERTS if "moe" in architecture else LORA


class GradientRecorder(TrainerCallback):
    """Keeps what the optimizer gets."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class StepRecorder(TrainerCallback):
    """Keeps what each optimizer step gets, the weights before it, and the microbatches that it came from."""

    def __init__(self):
        self.steps, self.microbatches = [], []

    def follow(self, trainer):
        original = trainer._compute_loss

        def compute_loss(model, inputs):
            self.microbatches.append({name: x for name, x in inputs.items() if isinstance(x, (torch.Tensor, list))})
            return original(model, inputs)

        trainer._compute_loss = compute_loss
        trainer.add_callback(self)
        return trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        self.steps.append((copy.deepcopy(model.state_dict()), gradients, self.microbatches))
        self.microbatches = []


def vowel_reward(completions, **kwargs):
    """A reward that differs between random completions."""
    return [sum(c in "aeiou0123" for c in completion) + 0.1 * len(completion) for completion in completions]


def make_args(output_dir: Path | str, config_class=PROMAConfig, **kwargs):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return config_class(str(output_dir), **{**settings, **kwargs})


def make_model(architecture="qwen3-tied", **kwargs):
    sizes = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}
    return tiny_model(architecture, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None, **sizes, **kwargs)


def make_trainer(
    output_dir, model=None, trainer_class=PROMATrainer, config_class=PROMAConfig, args=None, prompts=64, **kwargs
):
    trainer_names = ("peft_config", "callbacks", "eval_dataset", "rollout_func")
    trainer_kwargs = {name: kwargs.pop(name) for name in trainer_names if name in kwargs}
    model = make_model() if model is None else model
    # FSDP's modules can't be copied
    pristine = None if isinstance(model, FSDPModule) else copy.deepcopy(model)
    trainer = trainer_class(
        model=model,
        reward_funcs=kwargs.pop("reward_funcs", vowel_reward),
        args=args or make_args(output_dir, config_class, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": (["ab", "cde", "f", "what is 2?"] * 16)[:prompts]}),
        processing_class=TOKENIZER,
        **trainer_kwargs,
    )
    # The same architecture without TRL's head and without hooks, for the definition
    trainer.pristine = pristine
    return trainer


def make_inputs(k, seed, off_policy=False, prompt=4, completion=7):
    """A microbatch as TRL's loss takes it: left-padded prompts, padded completions, advantages with a zero."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(6, len(TOKENIZER), (k, length), generator=generator)

    prompt_mask, completion_mask = torch.ones(k, prompt, dtype=torch.long), torch.ones(k, completion, dtype=torch.long)
    for i in range(k):
        prompt_mask[i, : i % 3] = 0
        completion_mask[i, completion - (2 * i) % 4 :] = 0
    advantages = torch.randn(k, generator=generator)
    if k > 1:
        advantages[seed % k] = 0
    inputs = {
        "prompt_ids": torch.where(prompt_mask == 1, ids(prompt), TOKENIZER.pad_token_id),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.where(completion_mask == 1, ids(completion), TOKENIZER.pad_token_id),
        "completion_mask": completion_mask,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(40.0),
    }
    if off_policy:
        inputs["old_per_token_logps"] = -4.6 + 0.7 * torch.randn(k, completion, generator=generator)
    return inputs


def trainer_gradients(trainer, microbatches):
    """Gradients that the trainer's loss leaves in its model, and the losses that it reports."""
    trainer.current_gradient_accumulation_steps = len(microbatches)
    trainer.model.train()
    trainer.model.zero_grad()
    losses = []
    for i, inputs in enumerate(microbatches):
        trainer.accelerator.gradient_state._set_sync_gradients(i == len(microbatches) - 1)
        loss = trainer.compute_loss(trainer.model, inputs)
        losses.append(loss.item())
        trainer.accelerator.backward(loss * trainer.accelerator.gradient_accumulation_steps)
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}, losses


def token_log_probs(model, inputs, i, temperature=1.0):
    """`log p(y_t)` of sequence i's completion, from the model's own logits, `(T,)`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[i : i + 1]
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[i : i + 1]
    length = inputs["completion_ids"].size(1)
    logits = model(input_ids=ids, attention_mask=mask).logits[0, -length - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, -length:].unsqueeze(-1)).squeeze(-1)


def sequence_objective(trainer, inputs, i, count):
    """`-1/N sum_t w_t log p`, times the unclipped ratio: what sequence i minimizes at an advantage of one."""
    args = trainer.args
    k = len(inputs["advantages"])
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    weights = mask.double() * inputs.get("weights", torch.ones_like(mask)).double()

    def objective(model):
        log_probs = token_log_probs(model, inputs, i, trainer.temperature)
        old = inputs["old_per_token_logps"][i] if "old_per_token_logps" in inputs else log_probs.detach()
        log_ratio = log_probs - old
        if args.importance_sampling_level == "sequence":
            log_ratio = (log_ratio * mask[i]).sum() / mask[i].sum().clamp(min=1)
        total = -(log_ratio.exp() * weights[i]).sum()
        if args.loss_type == "grpo":
            return total / mask[i].sum().clamp(min=1) / k / count
        if args.loss_type == "bnpo":
            return total / mask.sum().clamp(min=1) / count
        if args.loss_type == "dr_grpo":
            return total / (k * args.max_completion_length) / count
        return total / (inputs["num_items_in_batch"] * count / args.steps_per_generation)

    return objective


class Batched:
    """Calls a model once on a whole microbatch, and answers for its sequences one after another."""

    def __init__(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        self.logits = iter(model(input_ids=ids, attention_mask=mask).logits.split(1))

    def __call__(self, **kwargs):
        return SimpleNamespace(logits=next(self.logits))


def batch_objectives(trainer, inputs, count):
    """The objectives of a microbatch as one function, for the definition of Intra-PROMA, and what else it takes."""

    def objectives(model):
        batched = Batched(model, inputs)
        k = len(inputs["advantages"])
        return torch.stack([sequence_objective(trainer, inputs, i, count)(batched) for i in range(k)])

    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return objectives, inputs["advantages"], mask


def definition(trainer, microbatches):
    """The arguments for the oracle: a model whose forward is the architecture's own, objectives and advantages."""
    model = copy.deepcopy(trainer.pristine)
    if isinstance(trainer.model, PeftModel):
        model = get_peft_model(model, trainer.model.peft_config["default"])
    model.load_state_dict(trainer.model.state_dict())
    count = len(microbatches)
    return model, [
        ([sequence_objective(trainer, m, i, count) for i in range(len(m["advantages"]))], m["advantages"])
        for m in microbatches
    ]


def check(trainer, microbatches, tolerance=1e-5):
    """The gradient for the optimizer is the definition's, and the reported loss is REINFORCE's."""
    found, losses = trainer_gradients(trainer, microbatches)
    model, objectives = definition(trainer, microbatches)
    values = [[] for _ in microbatches]

    def recorded(objective, own):
        def value(model):
            loss = objective(model)
            own.append(loss.item())
            return loss

        return value

    args = trainer.args
    want = oracle.accumulate(
        model,
        [([recorded(f, own) for f in of_batch], a) for (of_batch, a), own in zip(objectives, values, strict=True)],
        method=args.projection,
        sweeps=args.projection_sweeps,
        bound=args.projection_bound,
        strength=args.projection_strength,
    )
    oracle.assert_close(found, want, tolerance)
    for loss, (_, advantages), own in zip(losses, objectives, values, strict=True):
        value = sum(a * x for a, x in zip(advantages.tolist(), own, strict=True))
        assert loss == pytest.approx(value, rel=1e-4, abs=1e-6)


def inputs_for(architecture, k, **kwargs):
    # Eager attention in float64 is NaN where transformers masks all of a position's keys
    microbatches = [make_inputs(k, seed, **kwargs) for seed in range(3)]
    if architecture in ("gemma2-softcap", "gptj"):
        for inputs in microbatches:
            inputs["prompt_mask"][:] = 1
    return microbatches


def unscored(microbatches, which):
    """No token is scored in one microbatch, or in one sequence of each, as where completions are truncated."""
    for number, inputs in enumerate(microbatches):
        if which in ("all", number):
            inputs["completion_mask"][:] = 0
        elif isinstance(which, str):
            inputs["completion_mask"][{"first row": 0, "last row": -1}[which]] = 0
    return microbatches
