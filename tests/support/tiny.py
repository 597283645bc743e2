"""A tiny tokenizer and tiny policies, built in code: characters as tokens, a handful of parameters."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per printable character, with or without a chat template."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE if chat_template else None,
        padding_side="left",
    )


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **sizes: int) -> Qwen3ForCausalLM:
    """Returns a random Qwen3 with two small layers and a tied embedding. `sizes` replace those of its config."""
    set_seed(seed)
    defaults = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 512}
    config = Qwen3Config(
        **{**defaults, **sizes},
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)
