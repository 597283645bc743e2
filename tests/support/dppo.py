"""DPPO's definition (arXiv 2602.04879), from its formulas: one token at a time, in Python's double precision."""

import math

import torch

from support.harness import TOKENIZER, inputs_for


def divergence(kind, mu, pi, top=()):
    """
    D between two policies at a position.

    Args:
        kind (`str`): `"binary_tv"`, `"binary_kl"`, `"topk_tv"` or `"topk_kl"`.
        mu, pi (`float`): Log-probabilities of the sampled token under the sampling and the current policy.
        top: Pairs of the same for the other tokens of the K most probable.
    """
    events = [(math.exp(mu), math.exp(pi)), *((math.exp(m), math.exp(p)) for m, p in (top if "topk" in kind else ()))]
    rest = tuple(max(0.0, 1.0 - math.fsum(event[side] for event in events)) for side in (0, 1))
    if kind.endswith("tv"):
        return sum(abs(m - p) for m, p in [*events, rest]) / 2
    total = sum(m * math.log(m / p) for m, p in events if m > 0)
    # A smaller rest can't be told from zero in float32
    return max(0.0, total + rest[0] * math.log(max(rest[0], 2.0**-24) / max(rest[1], 2.0**-24)))


def token_weight(settings, advantage, mu, pi, top=()):
    """
    `min(r, C) * M`, what multiplies the gradient of a token's log-probability.

    Args:
        settings (`dict`): `divergence`, `low`, `high`, `mask` and `cap`.
        advantage (`float`): Of the token's sequence.
        mu, pi, top: As for [`divergence`]; NaN in `mu` where it is not known.
    """
    if math.isnan(mu):
        return 1.0
    log_ratio = pi - mu
    distance = divergence(settings["divergence"], mu, pi, top)
    leaves_up, leaves_down = distance > settings["high"], distance > settings["low"]
    if settings["mask"] == "symmetric":
        masked = advantage != 0 and ((log_ratio > 0 and leaves_up) or (log_ratio < 0 and leaves_down))
    else:
        masked = (advantage > 0 and log_ratio > 0 and leaves_up) or (advantage < 0 and log_ratio < 0 and leaves_down)
    return 0.0 if masked else min(math.exp(max(-20.0, min(20.0, log_ratio))), settings["cap"])


def settings_of(args):
    """The definition's settings from a configuration's fields, with the paper's thresholds where there are none."""
    low = args.divergence_threshold
    if low is None:
        low = 0.15 if args.divergence.endswith("tv") else 0.05
    return {
        "divergence": args.divergence,
        "low": low,
        "high": low if args.divergence_threshold_high is None else args.divergence_threshold_high,
        "mask": args.divergence_mask,
        "cap": math.inf if args.ratio_cap is None else args.ratio_cap,
    }


@torch.no_grad()
def token_weights(args, model, inputs, temperature=1.0):
    """Weights of a microbatch's tokens, `(k, T)`, from a model's own logits over the whole vocabulary."""
    settings, completions = settings_of(args), inputs["completion_ids"]
    k, length = completions.shape
    weights = torch.ones(k, length, dtype=torch.float64)
    for i in range(k):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[i : i + 1]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[i : i + 1]
        logits = model(input_ids=ids, attention_mask=mask).logits[0, -length - 1 : -1] / temperature
        log_probs = logits.double().log_softmax(-1)
        for t in range(length):
            top = []
            if "sampling_top_ids" in inputs:
                rows = zip(
                    inputs["sampling_top_ids"][i, t].tolist(), inputs["sampling_top_logps"][i, t].tolist(), strict=True
                )
                top = [(m, log_probs[t, token].item()) for token, m in rows if token >= 0]
            mu, pi = inputs["sampling_per_token_logps"][i, t].item(), log_probs[t, completions[i, t]].item()
            weights[i, t] = token_weight(settings, inputs["advantages"][i].item(), mu, pi, top)
    return weights


def stale_inputs(architecture, k, top_k, spread=1.0):
    """
    Microbatches that a policy has sampled whose log-probabilities differ from the trained one's, some of them missing,
    and of whose most probable tokens some positions have fewer.
    """
    microbatches = inputs_for(architecture, k)
    for seed, inputs in enumerate(microbatches):
        generator = torch.Generator().manual_seed(100 + seed)
        ids = inputs["completion_ids"]
        logits = spread * torch.randn(*ids.shape, len(TOKENIZER), generator=generator)
        log_probs = logits.log_softmax(-1)
        inputs["sampling_per_token_logps"] = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        inputs["sampling_per_token_logps"][0, 1] = torch.nan
        if top_k:
            values, tokens = log_probs.topk(min(top_k, len(TOKENIZER)))
            none = (tokens == ids.unsqueeze(-1)) | (torch.rand(tokens.shape, generator=generator) < 0.1)
            missing = top_k - tokens.shape[-1]
            pad = torch.nn.functional.pad
            inputs["sampling_top_ids"] = pad(tokens.int().masked_fill(none, -1), (0, missing), value=-1)
            inputs["sampling_top_logps"] = pad(values.masked_fill(none, -torch.inf), (0, missing), value=-torch.inf)
    return microbatches
