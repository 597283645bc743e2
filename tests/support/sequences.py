"""Batches of sequences, their objectives, and the accumulation in a plain PyTorch loop beside its definition."""

import torch
from peft import LoraConfig, get_peft_model

from proma_trl import ProjectedAccumulation
from support import oracle

VOCABULARY, LENGTH = 97, 12


def make_batch(k, seed, left_padding=True):
    """Token ids, attention mask, weights of the scored tokens, and advantages with a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (k, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(k):
        left, right = (i % 3 if left_padding else 0), (2 * i) % 5
        mask[i, :left] = 0
        mask[i, LENGTH - right :] = 0
    ids = ids * mask
    weights = (mask[:, 1:] * mask[:, :-1]).float() * (0.5 + torch.rand(k, LENGTH - 1, generator=generator))
    weights[:, :4] = 0
    advantages = torch.randn(k, generator=generator)
    if k > 1:
        advantages[seed % k] = 0
    return ids, mask, weights, advantages


def objectives(model, ids, mask, weights):
    """`-sum_t w_t log p(y_t)` for each sequence, `(k,)`."""
    logits = model(input_ids=ids, attention_mask=mask).logits[
        :, -ids.shape[1] : -1
    ]  # behind virtual tokens, if there are any
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return -(log_probs * weights).sum(-1) / LENGTH


def run(accumulation, batches, autocast=False, scale=1):
    """Accumulates some microbatches in the model's gradients."""
    model = accumulation.model
    model.zero_grad()
    for ids, mask, weights, advantages in batches:
        with accumulation.capture(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            objective = objectives(model, ids, mask, weights)
        (accumulation.loss(objective, advantages) * scale).backward()


def accumulate(model, batches, settings=None, microbatch_size=None, autocast=False, scale=1, **kwargs):
    """Gradients that PROMA leaves in a model after some microbatches, and its metrics."""
    size = microbatch_size or max(len(batch[0]) for batch in batches)
    accumulation = ProjectedAccumulation(model, settings, microbatch_size=size, **kwargs)
    run(accumulation, batches, autocast, scale)
    metrics = accumulation.pop_metrics()
    accumulation.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()  # so that no later backward pass adds to them
    return gradients, metrics


def expected(model, batches, **settings):
    def one(ids, mask, weights, i):
        return lambda m: objectives(m, ids[i : i + 1], mask[i : i + 1], weights[i : i + 1])[0]

    return oracle.accumulate(
        model,
        [([one(*batch[:3], i) for i in range(len(batch[0]))], batch[3]) for batch in batches],
        **settings,
    )


def make_batches(architecture, k, count=3):
    # Eager attention in float64 is NaN where transformers masks all of a position's keys
    return [make_batch(k, seed, left_padding=architecture != "gemma2-softcap") for seed in range(count)]


def lora(model, **kwargs):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    return model
