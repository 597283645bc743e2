import json

import pytest
from datasets import Dataset, DatasetDict
from support.tiny import make_tokenizer

from proma_trl.tools.data import (
    INSTRUCTION,
    build_prompt,
    drop_long_prompts,
    gold_answer,
    load_gsm8k,
    solved_examples,
    tokenize_prompts,
)

TRAIN = [
    {"question": "Ann has 2 hens and buys 3. How many has she?", "answer": "2 + 3 = <<2+3=5>>5 hens.\n#### 5"},
    {"question": "A house costs $1,000 and a shed $234. And both?", "answer": "1000 + 234 = 1234\n#### 1,234"},
]
TEST = [{"question": "It was 3 degrees and fell by 5.5. How much is it now?", "answer": "3 - 5.5 = -2.5\n#### -2.5"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TRAIN)
    write_jsonl(tmp_path / "test.jsonl", TEST)
    return str(tmp_path)


def test_folder_of_jsonl_files(folder):
    train, test = load_gsm8k(folder, "main", "train"), load_gsm8k(folder, "main", "test")
    assert train.column_names == ["prompt", "answer"]
    assert train["answer"] == ["5", "1234"]
    assert test["answer"] == ["-2.5"]
    assert train[0]["prompt"] == [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": TRAIN[0]["question"]},
    ]


def test_plain_prompts(folder):
    prompt = load_gsm8k(folder, conversational=False)[0]["prompt"]
    assert prompt == f"{INSTRUCTION}\n\nQuestion: {TRAIN[0]['question']}\nAnswer:"


def test_folder_of_parquet_files(tmp_path):
    Dataset.from_list(TRAIN).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    Dataset.from_list(TEST).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert load_gsm8k(str(tmp_path), "main", "test")["answer"] == ["-2.5"]


def test_single_files(tmp_path):
    path = write_jsonl(tmp_path / "problems.jsonl", TRAIN)
    assert load_gsm8k(path)["answer"] == ["5", "1234"]
    assert load_gsm8k(path, split="train[50%:]")["answer"] == ["1234"]
    Dataset.from_list(TEST).to_parquet(tmp_path / "problems.parquet")
    assert load_gsm8k(str(tmp_path / "problems.parquet"))["answer"] == ["-2.5"]


def test_folder_saved_to_disk(tmp_path):
    DatasetDict(train=Dataset.from_list(TRAIN), test=Dataset.from_list(TEST)).save_to_disk(tmp_path / "both")
    Dataset.from_list(TRAIN).save_to_disk(tmp_path / "one")
    assert load_gsm8k(str(tmp_path / "both"), split="test")["answer"] == ["-2.5"]
    assert load_gsm8k(str(tmp_path / "one"))["answer"] == ["5", "1234"]
    with pytest.raises(ValueError, match=r"has no split 'test'.*eval_every=0"):
        load_gsm8k(str(tmp_path / "one"), split="test")


def test_missing_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_name='.*nowhere' is neither .* Set dataset_name to"):
        load_gsm8k(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("no rows")
    with pytest.raises(FileNotFoundError, match=r"a \.txt file, where \.jsonl, \.json, \.parquet are read"):
        load_gsm8k(str(tmp_path / "notes.txt"))


def test_hub_out_of_reach():
    with pytest.raises(FileNotFoundError, match=r"dataset_name='openai/gsm8k' is neither .* Set dataset_name to"):
        load_gsm8k()


def test_missing_split(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no split 'validation'.*Set dataset_train_split and dataset_test_split"):
        load_gsm8k(folder, split="validation")
    with pytest.raises(ValueError, match=r"A single file has only the split 'train'"):
        load_gsm8k(str(tmp_path / "train.jsonl"), split="test")


def test_missing_columns(tmp_path):
    path = write_jsonl(tmp_path / "problems.jsonl", [{"problem": "1 + 1?", "answer": "#### 2"}])
    with pytest.raises(ValueError, match=r"lacks the column\(s\) question; it has problem, answer\. Rename"):
        load_gsm8k(path)


def test_answer_without_number(tmp_path):
    path = write_jsonl(tmp_path / "problems.jsonl", [*TRAIN, {"question": "?", "answer": "It is unknown."}])
    with pytest.raises(ValueError, match=r"Row 2 .* does not end with '#### <number>': 'It is unknown\.'"):
        load_gsm8k(path)


def test_gold_answer():
    assert gold_answer("5 hens\n#### 5") == "5"
    assert gold_answer("#### 4\n#### $12,345.50 ") == "12345.50"
    assert gold_answer("#### five") is None
    assert gold_answer("5") is None


@pytest.mark.parametrize("conversational", [False, True])
def test_tokenized_prompts_are_the_trainers(conversational):
    tokenizer = make_tokenizer(chat_template=conversational)
    prompts = [build_prompt(row["question"], conversational) for row in TRAIN]
    texts = [tokenizer.decode(ids) for ids in tokenize_prompts(prompts, tokenizer)]
    if conversational:
        assert texts[0].startswith(f"<|system|>{INSTRUCTION}")
        assert texts[0].endswith(f"<|user|>{TRAIN[0]['question']}<|assistant|>")
    else:
        assert texts == prompts


def test_long_prompts_are_dropped(folder, caplog):
    tokenizer = make_tokenizer()
    dataset = load_gsm8k(folder)
    lengths = [len(ids) for ids in tokenize_prompts(dataset["prompt"], tokenizer)]
    assert lengths[0] < lengths[1]
    assert len(drop_long_prompts(dataset, tokenizer, lengths[1])) == 2
    assert not caplog.records
    assert drop_long_prompts(dataset, tokenizer, lengths[1] - 1)["answer"] == ["5"]
    assert "Dropped 1 of 2 problems" in caplog.text
    with pytest.raises(ValueError, match=rf"leaves no problem: the shortest prompt has {lengths[0]} tokens\. Raise"):
        drop_long_prompts(dataset, tokenizer, lengths[0] - 1)


def test_solved_examples_come_before_the_problem(folder):
    examples = solved_examples(1, folder)
    assert examples[0][0] == TRAIN[0]["question"] and "<<" not in examples[0][1]
    messages = load_gsm8k(folder, split="test", examples=examples)[0]["prompt"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == examples[0][0] and messages[2]["content"] == examples[0][1]
    text = load_gsm8k(folder, split="test", conversational=False, examples=examples)[0]["prompt"]
    assert text.index(examples[0][1]) < text.rindex("Question:") and text.endswith("\nAnswer:")
