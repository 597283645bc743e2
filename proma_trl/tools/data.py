"""GSM8K, and data of its form, as prompts with checkable answers."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, get_dataset_config_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import ArrowInvalid
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]

INSTRUCTION = (
    "Solve the problem step by step. End with the final answer, a number, on a line of its own in this form: #### 42"
)

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_CALCULATOR = re.compile(r"<<.*?>>")
_GOLD = re.compile(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)\s*$")


def build_prompt(question: str, conversational: bool, examples: Sequence[tuple[str, str]] = ()) -> Prompt:
    """
    Puts a question as messages, the instruction in the system message, or as one string where there is no chat.

    `examples`, pairs of a question and its solution, come before it, as turns or in the string.
    """
    if conversational:
        turns = [
            {"role": role, "content": text}
            for example in examples
            for role, text in zip(("user", "assistant"), example, strict=True)
        ]
        return [{"role": "system", "content": INSTRUCTION}, *turns, {"role": "user", "content": question}]
    solved = "".join(f"Question: {problem}\nAnswer: {solution}\n\n" for problem, solution in examples)
    return f"{INSTRUCTION}\n\n{solved}Question: {question}\nAnswer:"


def gold_answer(solution: str) -> str | None:
    """Returns the number after the final `####` of a GSM8K solution, without thousands separators, or `None`."""
    match = _GOLD.search(solution)
    return match.group(1).replace(",", "") if match else None


def load_gsm8k(
    dataset_name: str = "openai/gsm8k",
    dataset_config: str | None = "main",
    split: str = "train",
    conversational: bool = True,
    examples: Sequence[tuple[str, str]] = (),
) -> Dataset:
    """
    Loads problems in the form of GSM8K: a column `question`, and a column `answer` that ends with `#### <number>`.

    Args:
        dataset_name (`str`), dataset_config (`str`, *optional*), split (`str`):
            See [`load_columns`].
        conversational (`bool`):
            Whether prompts are lists of messages, for a tokenizer with a chat template, or strings.
        examples (`Sequence[tuple[str, str]]`):
            Questions and solutions to show before each problem, see [`solved_examples`].

    Returns:
        [`~datasets.Dataset`]:
            Columns `prompt`, and `answer` with the correct number as a string (`"1234"`).

    Raises:
        `FileNotFoundError`: The dataset is neither there nor on the Hub.
        `ValueError`: It has no such split, configuration or columns, or an answer that does not end as GSM8K's do.
    """
    rows = load_columns(dataset_name, dataset_config, split, ("question", "answer"))
    answers = [gold_answer(solution) for solution in rows["answer"]]
    if None in answers:
        row = answers.index(None)
        raise ValueError(
            f"Row {row} of dataset_name={dataset_name!r} (split {split!r}) has an answer that does not end with "
            f"'#### <number>': {rows[row]['answer'][-80:]!r}. Every answer has to."
        )
    prompts = [build_prompt(question, conversational, examples) for question in rows["question"]]
    return Dataset.from_dict({"prompt": prompts, "answer": answers})


def solved_examples(
    count: int, dataset_name: str = "openai/gsm8k", dataset_config: str | None = "main", split: str = "train"
) -> list[tuple[str, str]]:
    """
    The first `count` problems of a split with their solutions, to show a model what is asked of it.

    GSM8K's notes for a calculator, `<<48/2=24>>`, are left out.

    Raises:
        `FileNotFoundError`, `ValueError`: As [`load_gsm8k`].
    """
    rows = load_columns(dataset_name, dataset_config, split, ("question", "answer")).select(range(count))
    return [(row["question"], _CALCULATOR.sub("", row["answer"])) for row in rows]


def load_columns(dataset_name: str, dataset_config: str | None, split: str, columns: Sequence[str]) -> Dataset:
    """
    Loads one split of a dataset that has to have some columns.

    Args:
        dataset_name (`str`):
            A dataset on the Hugging Face Hub, or a local one: a folder with a JSON Lines, JSON or Parquet file per
            split (`train.jsonl`, `test.jsonl`), a folder written by `save_to_disk`, or a single file, whose only split
            is `train`.
        dataset_config (`str`, *optional*):
            The dataset's configuration on the Hub. Local data without configurations ignore it.
        split (`str`):
            The split to load. Slices such as `train[:90%]` work, except in a `save_to_disk` folder.
        columns (`Sequence[str]`):
            The columns that it has to have; others are kept.

    Raises:
        `FileNotFoundError`: The dataset is neither there nor on the Hub.
        `ValueError`: It has no such split, configuration or columns.
    """
    try:
        rows = _load_split(dataset_name, dataset_config, split)
    except (FileNotFoundError, ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"dataset_name={dataset_name!r} is neither a local file or folder nor within reach on the Hugging Face "
            f"Hub ({error}). Set dataset_name to a Hub id, a folder with train.jsonl and test.jsonl, or a JSON Lines "
            "file."
        ) from error
    except (ValueError, DatasetGenerationError, ArrowInvalid) as error:
        broken = _broken_line(dataset_name)
        if broken is not None:
            raise ValueError(broken) from error
        if not isinstance(error, ValueError) or isinstance(error, ArrowInvalid):
            raise ValueError(f"dataset_name={dataset_name!r} can't be read: {error.__cause__ or error}") from error
        raise ValueError(
            f"dataset_name={dataset_name!r} with dataset_config={dataset_config!r} has no split {split!r}: {error} "
            "Set dataset_train_split and dataset_test_split to splits that it has. A single file has only the split "
            "'train', whose slices can serve as both ('train[:90%]' and 'train[90%:]'). Without problems to hold out, "
            "switch the evaluation off: eval_every=0 and eval_strategy=no."
        ) from error

    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"dataset_name={dataset_name!r} lacks the column(s) {', '.join(missing)}; it has "
            f"{', '.join(rows.column_names)}. Rename its columns to {' and '.join(columns)}."
        )
    return rows


def _broken_line(dataset_name: str) -> str | None:
    """What is wrong with the first line of local JSON Lines that is no object."""
    path = Path(dataset_name).expanduser()
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.suffix == ".jsonl" else []:
        number = 0
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                reason = getattr(error, "msg", "not text in UTF-8")
                return f"{file}, line {number}: not valid JSON ({reason}): {line[:60].decode(errors='replace')}"
            if not isinstance(row, dict):
                return f'{file}, line {number}: not an object, such as {{"prompt": "..."}}: {str(row)[:60]}'
        if number == 0:
            return f'{file} is empty. Each of its lines is an object, such as {{"prompt": "..."}}.'
    return None


def _load_split(dataset_name: str, dataset_config: str | None, split: str) -> Dataset:
    path = Path(dataset_name).expanduser()
    if path.is_file():
        if path.suffix not in _READERS:
            raise FileNotFoundError(f"a {path.suffix or 'nameless'} file, where {', '.join(_READERS)} are read")
        if path.stat().st_size == 0:
            raise ValueError("it is empty.")
        return load_dataset(_READERS[path.suffix], data_files={"train": str(path)}, split=split)
    if not path.is_dir():
        return load_dataset(dataset_name, dataset_config, split=split)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return splits[split]
    configs = get_dataset_config_names(str(path))
    return load_dataset(str(path), dataset_config if dataset_config in configs else None, split=split)


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None
) -> list[list[int]]:
    """Returns each prompt's token ids as TRL's trainers form them, the opening of the answer included."""
    if is_conversational({"prompt": prompts[0]}):
        tokenized = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
    else:
        tokenized = tokenizer(text=list(prompts))
    return tokenized["input_ids"]


def has_images(dataset: Dataset | IterableDataset) -> bool:
    """Whether prompts come with images, in one of the columns that TRL's trainers read."""
    return bool({"image", "images"} & set(dataset.column_names or ()))


def drop_long_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """
    Keeps the problems whose prompt has at most `max_prompt_length` tokens.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems with a column `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        max_prompt_length (`int`):
            The most tokens that a prompt may have, chat template included.
        chat_template_kwargs (`dict`, *optional*):
            What the trainer passes to the chat template.

    Returns:
        [`~datasets.Dataset`]: The problems that are short enough, in their order.

    Raises:
        `ValueError`: No problem is left.
    """
    lengths = [len(ids) for ids in tokenize_prompts(dataset["prompt"], tokenizer, chat_template_kwargs)]
    kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} leaves no problem: the shortest prompt has {min(lengths)} tokens. "
            "Raise max_prompt_length."
        )
    if len(kept) < len(lengths):
        logger.warning("Dropped %d of %d problems whose prompt is too long.", len(lengths) - len(kept), len(lengths))
    return dataset.select(kept)
