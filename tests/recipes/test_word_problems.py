import json
import re

import pytest

from proma_trl.recipes import word_problems
from proma_trl.tools.data import gold_answer, tokenize_prompts
from proma_trl.tools.rewards import accuracy_reward, format_reward


@pytest.fixture(scope="module")
def problems():
    return word_problems.make_problems(500, seed=0)


def test_problems_are_solved_by_their_steps(problems):
    for problem in problems:
        *steps, final = problem["answer"].splitlines()
        assert len(steps) == 4
        total = int(re.search(r"has (\d+)", problem["question"]).group(1))
        for step in steps:
            left, operation, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            assert int(left) == total
            total = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operation]
            assert int(result) == total
        assert final == f"#### {total}" == f"#### {gold_answer(problem['answer'])}"


@pytest.mark.parametrize("level", word_problems.LEVELS)
def test_levels(tmp_path, level):
    warm_start = word_problems.write_problems(tmp_path, seed=0, level=level)
    rows = [json.loads(line) for name in ("train", "test") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len(rows) == word_problems.TRAIN + word_problems.HELD_OUT
    questions = {row["question"] for row in [*warm_start, *rows]}
    assert len(questions) == len(warm_start) + len(rows)
    expected = word_problems.LEVELS[level]
    assert {len(row["answer"].splitlines()) - 1 for row in rows} == {expected.steps}
    numbers = [int(number) for row in rows for number in re.findall(r"\d+", row["answer"])]
    assert max(numbers) == expected.largest_number


def test_held_out_problems_are_others(problems):
    assert len({problem["question"] for problem in problems}) == len(problems)
    assert word_problems.make_problems(20, seed=0) == problems[:20]
    assert word_problems.make_problems(20, seed=1) != problems[:20]


def test_tokenizer_knows_every_word(problems):
    tokenizer = word_problems.make_tokenizer(problems)
    for problem in problems:
        ids = tokenizer(problem["question"] + "\n" + problem["answer"])["input_ids"]
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(tokenizer(problem["answer"])["input_ids"])
        assert accuracy_reward([decoded], [problem["answer"]]) == format_reward([decoded]) == [1.0]
    prompt = [{"role": "system", "content": "unread"}, {"role": "user", "content": "How many?"}]
    ids = tokenize_prompts([prompt], tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "How", "many", "?", "<|assistant|>"]
