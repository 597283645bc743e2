import threading

import pytest

from proma_trl.tools import rewards
from proma_trl.tools.rewards import accuracy_reward, final_answer, format_reward


def is_right(completion, answer="18"):
    return accuracy_reward([completion], [answer])[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 18", "18"),
        ("She sells 16 - 3 - 4 = 9 eggs a day.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### $18", "18"),
        ("#### \\$18.00", "18"),
        ("#### 18 dollars", "18"),
        ("#### **18**", "18"),
        ("####18.", "18"),
        ("####\n18", "18"),
        ("#### +18", "18"),
        ("#### 1,234.50", "1234.5"),
        ("#### $1,234.50 a week", "1,234.5"),
        ("#### 1,000,000", "1000000"),
        ("#### €40", "40"),
        ("#### 60 miles per hour", "60"),
        ("#### 18%", "18"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("#### -$5", "-5"),
        ("#### 0.5", "1/2"),
        ("#### 1/2", "0.5"),
        ("So the total is $\\boxed{18}$.", "18"),
        ("\\boxed{18\\text{ dollars}}", "18"),
        ("\\boxed{\\$1,234.50}", "1234.5"),
        ("\\boxed{x = 18}", "18"),
        ("\\boxed {\\frac{1}{2}}", "0.5"),
        ("Final answer: **18**", "18"),
        ("12 + 6 = 18 eggs.", "18"),
        ("so $12 + 6 = 18$", "18"),
        ("#### 18", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 18"),
        ("#### 1234", "... #### 1,234"),
    ],
)
def test_right_answers(completion, answer):
    assert is_right(completion, answer) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "####",
        "18 is not it\n####",
        "no number",
        "#### eighteen",
        "#### 17",
        "#### 118",
        "#### 1.8",
        "#### -18",
        "#### 18 or 19 #### 19",
        "\\boxed{17} and 18",
        "\\boxed{",
        "\\boxed{}",
        "\\boxed{(18, 19)}",
        "#### 12 + 6",
        "#### 20 - 2",
        "#### 9 * 2",
        "\x00\ufffd $$ \\frac{ {{{ 19",
    ],
)
def test_wrong_answers(completion):
    assert is_right(completion) == 0.0


def test_last_marked_answer_counts():
    assert is_right("#### 17\nNo: \\boxed{18}") == 1.0
    assert is_right("\\boxed{18}\nNo:\n#### 17") == 0.0
    # What follows the marked answer is not taken for one.
    assert is_right("#### 18\nThat took me 3 steps.") == 1.0


def test_conversational_completions():
    completions = [
        [{"role": "assistant", "content": "#### 18"}],
        [{"role": "assistant", "content": "#### 17"}],
        [{"role": "assistant", "content": None}],
    ]
    assert accuracy_reward(completions, ["18"] * 3) == [1.0, 0.0, 0.0]
    assert format_reward(completions) == [1.0, 1.0, 0.0]


def test_other_columns_are_ignored():
    assert accuracy_reward(completions=["#### 18"], answer=["18"], prompts=["?"], trainer_state=None) == [1.0]
    assert format_reward(completions=["#### 18"], answer=["18"], prompts=["?"], trainer_state=None) == [1.0]


def test_answer_that_is_no_number_leaves_the_sample_unscored():
    assert accuracy_reward(["#### 18", "#### 18"], ["eighteen", "18"]) == [None, 1.0]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("in_thread", [False, True])
def test_garbage_neither_hangs_nor_raises(in_thread):
    garbage = [
        "#### 9^9^9^9",
        "\\boxed{9^{9^{9^9}}}",
        "$9^{9^{99999}}$",
        "\\boxed{99999999!}",
        "\\boxed{\\int_0^1 x^{x^x} dx}",
        "\\boxed{\\sum_{n=1}^{999999999} n!}",
        "\\boxed{" * 500,
        "$" * 5000,
        "#" * 5000,
        "((((" * 2000,
        "1 " * 5000,
        "9" * 5000,
        "\\frac{1}{" * 300,
    ]
    rewards = []

    def score():
        rewards.extend(accuracy_reward(garbage, ["18"] * len(garbage)))

    if in_thread:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
    else:
        score()
    assert rewards == [0.0] * len(garbage)


def test_final_answer():
    assert final_answer("a #### 1,234 ") == "1,234"
    assert final_answer("a ####") is None
    assert final_answer("a \\boxed{5} b").startswith("\\boxed{5}")
    assert final_answer("x" * 3000) == "x" * 1000


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#### 18", 1.0),
        ("Some steps.\n#### 1,234.5\n", 1.0),
        ("Some steps.\n#### -$18.00", 1.0),
        ("Some steps. #### 18", 0.0),
        ("#### 18 dollars", 0.0),
        ("#### 18\nDone.", 0.0),
        ("#### 17\n#### 18", 0.0),
        ("####18", 0.0),
        ("#### 1,23", 0.0),
        ("\\boxed{18}", 0.0),
        ("18", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(completion, reward):
    assert format_reward([completion]) == [reward]


def test_an_answer_is_read_once(monkeypatch):
    read = []
    original = rewards.parse
    monkeypatch.setattr(rewards, "parse", lambda text, **kwargs: read.append(text) or original(text, **kwargs))
    rewards._read_number.cache_clear()
    completions = ["3 + 4 = 7\n#### 7", "2 + 5 = 7\n#### 7", "#### 8", "#### no"]
    assert rewards.accuracy_reward(completions, ["1 + 6\n#### 7"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert sorted(read) == ["7", "8", "no"]
    # What a caller does to the list is its own affair
    rewards.parse_number("#### 7").clear()
    assert rewards.parse_number("#### 7") == [7]
