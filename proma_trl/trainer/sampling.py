"""What can be known of a vLLM server before it is trained with."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn
from transformers import AutoConfig

from .config import PROMAConfig

if TYPE_CHECKING:
    from trl.generation.vllm_client import VLLMClient

# What must agree for a server to take the trained weights and to know the tokens
_SHAPES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def check_server(client: VLLMClient, model: nn.Module) -> None:
    """
    Check that a server serves a model whose weights the trained one's can replace.

    Args:
        client (`VLLMClient`): TRL's connection to the server.
        model (`nn.Module`): The policy.

    Warns:
        UserWarning: If the server's model has another name, and its configuration can't be read here.

    Raises:
        ValueError: If its architecture is another one.
    """
    served, trained = client.get_server_info()["model_config"]["model"], model.config._name_or_path
    if served == trained:
        return
    try:
        theirs = AutoConfig.from_pretrained(served).get_text_config()
    except (OSError, ValueError):  # a folder on the server's machine, a model that is not in reach, unknown code
        warnings.warn(
            f"The vLLM server at {client.base_url} serves {served!r}, and {trained!r} is trained. If these are models "
            "of different architectures, training will fail when weights are sent.",
            stacklevel=2,
        )
        return
    ours = model.config.get_text_config()
    differing = [
        f"`{name}` is {getattr(theirs, name, None)!r} there and {getattr(ours, name)!r} here"
        for name in _SHAPES
        if getattr(ours, name, None) not in (None, getattr(theirs, name, None))
    ]
    if differing:
        raise ValueError(
            f"The vLLM server at {client.base_url} serves another model, {served!r}: {', '.join(differing)}. Start it "
            f"with the model that is trained, `vllm serve {trained} ...`, or point `vllm_server_base_url` (or "
            "`vllm_server_host` and `vllm_server_port`) to the server that has it."
        )


def check_server_log_probs(client: VLLMClient, args: PROMAConfig) -> None:
    """
    Check that a server's log-probabilities are those of the distribution that it samples from.

    Args:
        client (`VLLMClient`): TRL's connection to the server.
        args ([`PROMAConfig`]): The configuration, with a `divergence`.

    Raises:
        ValueError: If they are not.
    """
    mode = client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"`divergence={args.divergence!r}` compares the policy with what the vLLM server at {client.base_url} "
            f"sampled from, and the server runs with `--logprobs-mode {mode}`. Start it with `--logprobs-mode "
            "processed_logprobs`."
        )
