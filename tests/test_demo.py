import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from proma_trl.data import gold_answer, tokenize_prompts
from proma_trl.rewards import accuracy_reward, format_reward

DEMO = Path(__file__).parents[1] / "recipes" / "demo.py"

spec = importlib.util.spec_from_file_location("demo", DEMO)
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


@pytest.fixture(scope="module")
def problems():
    return demo.make_problems(500, seed=0)


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


def test_held_out_problems_are_others(problems):
    assert len({problem["question"] for problem in problems}) == len(problems)
    assert demo.make_problems(20, seed=0) == problems[:20]
    assert demo.make_problems(20, seed=1) != problems[:20]


def test_tokenizer_knows_every_word(problems):
    tokenizer = demo.make_tokenizer(problems)
    for problem in problems:
        ids = tokenizer(problem["question"] + "\n" + problem["answer"])["input_ids"]
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(tokenizer(problem["answer"])["input_ids"])
        assert accuracy_reward([decoded], [problem["answer"]]) == format_reward([decoded]) == [1.0]
    prompt = [{"role": "system", "content": "unread"}, {"role": "user", "content": "How many?"}]
    ids = tokenize_prompts([prompt], tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "How", "many", "?", "<|assistant|>"]


@pytest.mark.parametrize(("after", "succeeds"), [(0.45, False), (0.51, True)])
def test_demo_fails_without_the_rise(tmp_path, monkeypatch, capsys, after, succeeds):
    monkeypatch.setattr(demo, "warm_start", lambda *arguments: None)
    monkeypatch.setattr(demo, "train", lambda *arguments: (0.4, after))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if succeeds:
        demo.main()
    else:
        with pytest.raises(SystemExit, match="to rise by 10 points"):
            demo.main()
    assert f"{100 * (after - 0.4):+.1f} points" in capsys.readouterr().out
    files = [(tmp_path / "problems" / name).read_text().splitlines() for name in ("train.jsonl", "test.jsonl")]
    train, held_out = ({json.loads(line)["question"] for line in lines} for lines in files)
    assert len(held_out) == demo.HELD_OUT >= 200
    assert not train & held_out
