"""
Forward passes without the columns that are padding in all of their sequences.

TRL pads each microbatch to the longest prompt and the longest completion of the whole generation batch. Here, TRL's
scoring function, from tokens to log-probabilities, runs on those columns only in which some sequence has a real token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..accumulation.emission import lowest_precision
from ..sequence_grads.layer import autocast_dtype, base_model, output_tolerance
from .step_layout import can_order, join, take

# Model inputs that hold a number for each token
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")

# What a model is probed with: text of which each tokenizer knows some, and columns of padding before it
_TEXT, _NUM_TOKENS, _PADDING = "0 1 2 3 4 5 6 7", 8, 3

Scores = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Columns:
    """
    The columns of a microbatch `(k, P + C)` to run a model on.

    Attributes:
        start (`int`), stop (`int`): The first column, and the one after the last.
        num_scored (`int`): How many of the last ones belong to completions.
    """

    start: int
    stop: int
    num_scored: int


def real_columns(attention_mask: torch.Tensor, num_scored: int, multiple: int = 1, spare: int = 0) -> Columns:
    """
    The columns in which some sequence has a real token. One column of prompts and one of completions always stay.

    Args:
        attention_mask (`(k, P + C)`): 1 for real tokens. Prompts are padded on the left, completions on the right.
        num_scored (`int`): C.
        multiple (`int`, defaults to `1`): The lengths of prompts and completions that remain are multiples of this,
            as far as there are columns.
        spare (`int`, defaults to `0`): How many columns of padding stay on the right, where there are any.
    """
    real = attention_mask.ne(0).any(0).tolist()
    split = len(real) - num_scored
    prompt = split - next((i for i in range(split) if real[i]), split - 1)
    scored = next((i for i in range(num_scored, 0, -1) if real[split + i - 1]), 1) + spare
    prompt, scored = (-(-length // multiple) * multiple for length in (prompt, scored))
    return Columns(max(0, split - prompt), split + min(scored, num_scored), min(scored, num_scored))


class PaddingTrimmer:
    """
    Runs a model without columns of padding.

    Without columns on the right, results are the same. Without columns on the left, tokens have other positions: most
    models can be told the former ones, some take positions from the attention mask, and a few do not ignore padding
    at all. [`~PaddingTrimmer.probe`] finds out which kind a model is.

    Args:
        model (`nn.Module`): The model, or PEFT's around it.
        multiple (`int`, *optional*): What the lengths of prompts and completions remain multiples of.
        spare (`int`, defaults to `0`): How many columns of padding stay on the right.
    """

    def __init__(self, model: nn.Module, multiple: int | None = None, spare: int = 0):
        base = base_model(model)
        self._multiple, self._spare = multiple or 1, spare
        # PEFT leaves positions out where it puts virtual tokens before a model's own
        virtual = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
        self._takes_positions = not virtual and "position_ids" in inspect.signature(base.forward).parameters
        # With images, these models make positions of more than one dimension
        self._positions_from_images = any(hasattr(module, "get_rope_index") for module in base.modules())
        self._is_probed = self._is_invariant = self._needs_positions = False

    def probe(self, trainer: Any, model: nn.Module, log_probs: Callable[..., torch.Tensor]) -> None:
        """
        Find out, once, how the model takes padding on the left; until then, that is left in. All ranks call this
        together, outside of `capture`.

        Args:
            trainer (`GRPOTrainer`): Whose accelerator and tokenizer are used.
            model (`nn.Module`): The model as the trainer runs it.
            log_probs (`Callable`): See [`~PaddingTrimmer.compare`].
        """
        if self._is_probed:
            return
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        tokens = tokenizer(_TEXT)["input_ids"] or [tokenizer.pad_token_id]
        device = trainer.accelerator.device
        with trainer.accelerator.autocast():
            autocast = autocast_dtype(device)
        precision = lowest_precision(*{p.dtype for p in model.parameters() if p.is_floating_point()}, autocast)
        is_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                self.compare(log_probs, (_NUM_TOKENS * tokens)[:_NUM_TOKENS], precision, device)
        finally:
            model.train(is_training)

    def compare(
        self,
        log_probs: Callable[..., torch.Tensor],
        tokens: Sequence[int],
        precision: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Compare the model's results with and without columns of padding before its tokens.

        Args:
            log_probs (`Callable`): From `input_ids` and `attention_mask`, and perhaps `position_ids`, each `(1, T)`,
                to the log-probabilities of all tokens but the first, without dropout.
            tokens (`Sequence[int]`): Some tokens of text.
            precision (`torch.dtype`): The lowest precision of the model's products.
            device (`torch.device`): Where the model's inputs are.
        """
        ids = torch.tensor([[*tokens]], device=device)
        padded = pad(ids, (_PADDING, 0), value=tokens[0])
        mask = pad(torch.ones_like(ids), (_PADDING, 0))
        want = log_probs(padded, mask)[:, _PADDING:].double()

        def error(**kwargs: torch.Tensor) -> float:
            found = log_probs(ids, mask[:, _PADDING:], **kwargs).double()
            return float((found - want).norm() / want.norm())

        tolerance = output_tolerance(precision, None)
        without, given = error(), float("inf")
        if self._takes_positions:
            given = error(position_ids=torch.arange(_PADDING, padded.shape[1], device=device).unsqueeze(0))
        self._is_probed = True
        self._is_invariant = without <= tolerance
        # Also where both give the same, as log-probabilities are rounded: positions then are as they would have been
        self._needs_positions = given <= min(without, tolerance)

    def columns(self, attention_mask: torch.Tensor, num_scored: int, has_images: bool = False) -> Columns:
        """The columns to run the model on, see [`real_columns`]: on the left, only if results stay the same."""
        found = real_columns(attention_mask, num_scored, self._multiple, self._spare)
        if self._is_invariant or (self._needs_positions and not self._makes_positions(has_images)):
            return found
        return Columns(0, found.stop, found.num_scored)

    def positions(
        self, columns: Columns, input_ids: torch.Tensor, has_images: bool = False
    ) -> dict[str, torch.Tensor]:
        """The model's further arguments where columns on the left are missing."""
        if columns.start == 0 or not self._needs_positions or self._makes_positions(has_images):
            return {}
        positions = torch.arange(columns.start, columns.stop, device=input_ids.device)
        return {"position_ids": positions.expand(len(input_ids), -1)}

    def score(
        self,
        score: Callable[..., Scores],
        model: Callable[..., Any],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_scored: int,
        **kwargs: Any,
    ) -> Scores:
        """
        What TRL's scoring function returns, computed without columns of padding.

        Args:
            score (`Callable`): TRL's function.
            model (`Callable`), input_ids (`(k, P + C)`), attention_mask (`(k, P + C)`), kwargs: Its arguments.
            num_scored (`int`): C.

        Returns:
            `tuple`: Tensors `(k, C)`, zero at columns that are left out; and what else there is.
        """
        has_images = kwargs.get("pixel_values") is not None
        columns = self.columns(attention_mask, num_scored, has_images)
        kept = slice(columns.start, columns.stop)
        for name in TOKEN_INPUTS:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, kept]
        positions = self.positions(columns, input_ids, has_images)
        found = score(
            partial(model, **positions) if positions else model,
            input_ids[:, kept],
            attention_mask[:, kept],
            columns.num_scored,
            **kwargs,
        )
        missing = num_scored - columns.num_scored
        return tuple(pad(x, (0, missing)) if x is not None and x.dim() == 2 else x for x in found)

    def score_in_chunks(
        self,
        score: Callable[..., Scores],
        model: Callable[..., Any],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_scored: int,
        size: int,
        **kwargs: Any,
    ) -> Scores:
        """The same for more sequences than fit: chunks of `size` sequences of similar length, one after another."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor | list)}
        options = {name: x for name, x in kwargs.items() if name not in inputs}
        sequences = join([inputs], counted_by="input_ids")
        if sequences is None:
            return self.score(score, model, input_ids, attention_mask, num_scored, batch_size=size, **kwargs)
        order = list(range(len(input_ids)))
        if can_order(sequences):
            lengths = attention_mask[:, -num_scored:].sum(1).tolist()
            order.sort(key=lambda i: (-lengths[i], i))
        chunks = [take(sequences, order[start : start + size]) for start in range(0, len(order), size)]
        parts = [self.score(score, model, num_scored=num_scored, **chunk, **options) for chunk in chunks]
        places = torch.tensor(order, device=input_ids.device).argsort()
        return tuple(None if xs[0] is None else torch.cat(xs)[places] for xs in zip(*parts, strict=True))

    def _makes_positions(self, has_images: bool) -> bool:
        return has_images and self._positions_from_images
