"""Log-probabilities of sampled tokens under the policy that sampled them, from each of TRL's samplers.

TRL carries a list of numbers with a completion: through turns of tools, truncation and padding. A [`SampledToken`] is
such a number, and takes the sampler's most probable tokens along.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LogitsProcessor

from .trl_internals import recorded, replaced

# vLLM returns no more log-probabilities at a position, unless a server is started for it
VLLM_MAX_TOP_K = 20

_NO_TOKEN = -1

# What rounding may leave of the log-probability of a certain token
_ROUNDING = 0.01


class SampledToken(float):
    """
    A token's log-probability, with the ids and log-probabilities of the tokens that were more probable or nearly so.

    Args:
        value (`float`): Log-probability of the sampled token; NaN where it is not known.
        ids (`(K,)`, int32), log_probs (`(K,)`, float32): Other tokens. An id of -1 is none.
    """

    __slots__ = ("ids", "log_probs")

    def __new__(cls, value: float, ids: np.ndarray, log_probs: np.ndarray) -> SampledToken:
        token = super().__new__(cls, value)
        token.ids, token.log_probs = ids, log_probs
        return token


def top_tensors(sampled: Sequence[Sequence[float]], length: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What [`SampledToken`]s carry, as tensors on the CPU: ids `(B, length, top_k)` in int32, -1 where there is no token,
    and log-probabilities in float32, `-inf` there. Plain numbers, such as those of a tool's tokens, carry nothing.
    """
    ids = np.full((len(sampled), length, top_k), _NO_TOKEN, dtype=np.int32)
    log_probs = np.full(ids.shape, -np.inf, dtype=np.float32)
    for i, tokens in enumerate(sampled):
        for t, token in enumerate(tokens):
            if isinstance(token, SampledToken):
                ids[i, t, : len(token.ids)], log_probs[i, t, : len(token.ids)] = token.ids, token.log_probs
    log_probs[ids == _NO_TOKEN] = -np.inf
    return torch.from_numpy(ids), torch.from_numpy(log_probs)


def check_log_probs(
    log_probs: Sequence[Sequence[float | None]] | None,
    completions: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]] | None,
    needed_by: str,
    way_out: str,
) -> None:
    """
    Check that a rollout's log-probabilities are one number for each token. In TRL's tensors, a gap would count as a
    probability of one, and a single number as that of all tokens.

    Args:
        log_probs (`list[list[float]]` or `None`): Those of the sampled tokens; `None` or NaN where one is not known.
        completions (`list[list[int]]`): The tokens.
        masks (`list[list[int]]` or `None`): 0 for tokens that were not sampled, a tool's or an environment's.
        needed_by (`str`): The setting that needs them.
        way_out (`str`): What to do otherwise.

    Raises:
        ValueError: If they are not, with the completion's place.
    """
    what = f"{needed_by} needs the log-probabilities of sampled tokens, and"
    if log_probs is None:
        raise ValueError(f"{what} `rollout_func` returned None as `logprobs`. Return them, or {way_out}.")
    if len(log_probs) != len(completions):
        raise ValueError(
            f"{what} the rollout has {len(completions)} completions and `logprobs` for {len(log_probs)}. Return one "
            f"list of numbers for each completion, or {way_out}."
        )
    for i, (ids, values) in enumerate(zip(completions, log_probs, strict=True)):
        found = len(values) if hasattr(values, "__len__") else "no list of"
        if found != len(ids):
            raise ValueError(
                f"{what} completion {i} of the rollout has {len(ids)} tokens and {found} numbers in `logprobs`. "
                "Return one number for each token, None where it is not known (tokens that a tool or an environment "
                f"wrote are masked, and can have any), or {way_out}."
            )
        mask = [] if masks is None else masks[i]
        for t, value in enumerate(values):
            if value is None or isinstance(value, SampledToken):
                continue
            if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) != 0:
                raise ValueError(
                    f"{what} `logprobs` holds {value!r} for token {t} of completion {i} in the rollout, which is no "
                    "number. Return the sampled token's number alone, where vLLM gives a list of the most probable "
                    f"tokens', or {way_out}."
                )
            sampled = t >= len(mask) or mask[t]
            if sampled and (value > _ROUNDING or math.isinf(value)):
                raise ValueError(
                    f"{what} `logprobs` holds {float(value)} for token {t} of completion {i} in the rollout. A "
                    "sampled token's log-probability is finite and at most 0. Return natural logarithms of "
                    f"probabilities, or {way_out}."
                )


@contextmanager
def sampler_log_probs(
    trainer: Any, top_k: int
) -> Iterator[Callable[[Sequence[Sequence[int]]], list[list[SampledToken]]]]:
    """
    Within the context, the trainer samples one turn. Yields a function that takes the sampled ids, after the context,
    and returns their log-probabilities under the distribution that they were drawn from, with temperature and
    truncation.

    Args:
        trainer (`GRPOTrainer`): Whose sampler it is: vLLM, transformers' continuous batching or `generate`.
        top_k (`int`): Number of most probable tokens to keep at each position; 0 for none.

    Raises:
        RuntimeError: By the function, if the sampler did not draw each token from a distribution that it showed.
    """
    if trainer.use_vllm:
        with recorded(trainer.vllm_generation, "generate") as calls:
            yield lambda completions: _from_vllm(completions, *calls["result"][2:], top_k)
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if trainer.use_transformers_continuous_batching:
        with recorded(model, "generate_batch") as calls:
            yield lambda completions: _from_continuous_batching(completions, calls["result"])
        return
    steps = _Steps(top_k)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    original = model._get_logits_processor

    def processors(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.append(steps)
        return found

    with replaced(model, "_get_logits_processor", processors):
        yield steps.of


def _from_vllm(
    completions: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[Sequence[float | None]]],
    ids: Sequence[Sequence[Sequence[int]]] | None,
    top_k: int,
) -> list[list[SampledToken]]:
    """vLLM gives the most probable tokens and the sampled one, `None` for NaN."""
    if ids is None:  # of the sampled tokens alone
        ids = [[[token] for token in completion] for completion in completions]
    return [
        [_token(*position, top_k) for position in zip(*sequence, strict=True)]
        for sequence in zip(completions, ids, log_probs, strict=True)
    ]


def _token(sampled: int, ids: Sequence[int], log_probs: Sequence[float | None], top_k: int) -> SampledToken:
    known = {i: float("nan") if value is None else value for i, value in zip(ids, log_probs, strict=True)}
    value = known.pop(sampled, float("nan"))
    others = [(i, other) for i, other in known.items() if other > float("-inf")][:top_k]
    return SampledToken(
        value,
        np.array([i for i, _ in others], dtype=np.int32),
        np.array([other for _, other in others], dtype=np.float32),
    )


def _from_continuous_batching(
    completions: Sequence[Sequence[int]], outputs: dict[str, Any]
) -> list[list[SampledToken]]:
    none = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    found = [[SampledToken(value, *none) for value in output.logprobs] for output in outputs.values()]
    if [len(values) for values in found] != [len(ids) for ids in completions]:
        raise RuntimeError(
            "Continuous batching returned no log-probability for some tokens, and `divergence` needs them. Set "
            "`use_transformers_continuous_batching=False`."
        )
    return found


class _Steps(LogitsProcessor):
    """
    The last of `generate`'s processors: it sees, step by step, the scores that tokens are drawn from.

    Args:
        top_k (`int`): Number of most probable tokens to keep; 0 for none.
    """

    def __init__(self, top_k: int):
        self.top_k = top_k
        self._scores: torch.Tensor | None = None
        self._tokens: list[torch.Tensor] = []
        self._log_probs: list[torch.Tensor] = []
        self._top: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # What was drawn from the last scores is known only now
        self._draw(input_ids[:, -1])
        self._scores = scores
        return scores

    def of(self, completions: Sequence[Sequence[int]]) -> list[list[SampledToken]]:
        """Log-probabilities of what was sampled."""
        if self._scores is not None and len(self._scores) == len(completions):
            step = len(self._tokens)
            last = [ids[step] if len(ids) > step else 0 for ids in completions]
            self._draw(torch.tensor(last, device=self._scores.device))
        drawn = torch.stack(self._tokens, 1).tolist() if self._tokens else []
        if len(drawn) != len(completions) or any(
            found[: len(ids)] != list(ids) for ids, found in zip(completions, drawn, strict=True)
        ):
            raise RuntimeError(
                "The sampled tokens were not drawn one by one from the scores that `generate` shows, so that their "
                "log-probabilities, which `divergence` needs, are not known. Leave beam search and assisted "
                "generation out of `generation_kwargs`."
            )
        log_probs = torch.stack(self._log_probs, 1).tolist()
        if self.top_k:
            ids, values = (torch.stack(x, 1).cpu().numpy() for x in zip(*self._top, strict=True))
        else:
            shape = (len(completions), len(self._tokens), 0)
            ids, values = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        return [
            [SampledToken(log_probs[i][t], ids[i, t], values[i, t]) for t in range(len(completion))]
            for i, completion in enumerate(completions)
        ]

    def _draw(self, tokens: torch.Tensor) -> None:
        if self._scores is None:
            return
        scores, tokens = self._scores.float(), tokens.unsqueeze(-1)
        log_z = scores.logsumexp(-1, keepdim=True)
        self._tokens.append(tokens.squeeze(-1))
        self._log_probs.append((scores.gather(-1, tokens) - log_z).squeeze(-1))
        if self.top_k:
            values, ids = scores.topk(min(self.top_k, scores.shape[-1]))
            none = (ids == tokens) | values.isneginf()
            self._top.append((ids.int().masked_fill(none, _NO_TOKEN), values - log_z))
        self._scores = None
