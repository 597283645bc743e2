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


# Between thousands
SEPARATORS = [
    ",",
    "\\,",
    "\\;",
    "\\:",
    "\\ ",
    ",\\!",
    "{,}",
    "{\\,}",
    "~",
    "'",
    "’",
    "_",
    "\u2009",
    "\u202f",
    "\u00a0",
    " ",
]
FORMS = [
    "#### {}",
    "\\boxed{{{}}}",
    "\\boxed{{\\text{{{}}}}}",
    "<answer>{}</answer>",
    "The answer is ${}$.",
    "\\boxed{{\\${} a day}}",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_thousands(separator, form):
    if separator == " " and form.startswith("The"):
        return  # in a sentence, it could stand between two numbers
    assert is_right(form.format(separator.join(("1", "080"))), "1080") == 1.0
    assert is_right(form.format(separator.join(("-12", "345", "678"))), "-12345678") == 1.0
    # Neither groups of another length, nor a number that goes on
    for digits in (("1", "08"), ("1", "0800"), ("1", "080", "1")):
        assert is_right(form.format(separator.join(digits)), "".join(digits)) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        # Tags, in one line or in several
        "<answer>18</answer>",
        "<answer>\n18\n</answer>",
        "<answer> 18 </answer>.",
        "<ANSWER>$18</ANSWER>",
        "<think>17</think><answer>18</answer>",
        "<answer>17</answer> No: <answer>18</answer>",
        "<answer>18</answer>\nThat took me 3 steps.",
        "<answer>18 dollars</answer>",
        "<answer>\\boxed{18}</answer>",
        "<answer>12 + 6\n#### 18</answer>",
        "<answer>\n12 + 6 = 18\nSo she has 18 eggs.\n</answer>",
        "#### <answer>18</answer>",
        "<answer>18",
        "<think>I shall put it in <answer> tags.</think>\n#### 18",
        "<think>I shall put it in <answer> tags.</think> <answer>18</answer>",
        "The answer is <b>18</b>.",
        # Text and fonts within a box
        "\\boxed{\\text{18}}",
        "\\boxed{\\text{ 18 dollars}}",
        "\\boxed{\\text{\\$18}}",
        "\\boxed{\\text{18}\\text{ eggs}}",
        "\\boxed{\\text{Total: }18}",
        "\\boxed{\\text{Total} = 18}",
        "\\boxed{\\mathbf{18}}",
        "\\boxed{\\mathbf{x = 18}}",
        "\\boxed{\\textbf{18}}",
        "\\boxed{\\boldsymbol{\\frac{36}{2}}}",
        "\\boxed{{18}}",
        "\\fbox{18}",
        "So it is $\\mathbf{18}$.",
        "#### \\text{18}",
        # Currencies and units
        "\\boxed{18\\$}",
        "\\boxed{€18}",
        "\\boxed{18 €}",
        "\\boxed{\\pounds 18}",
        "\\boxed{₹18}",
        "\\boxed{\\text{USD }18}",
        "\\boxed{18 dollars}",
        "\\boxed{18\\ eggs}",
        "\\boxed{18~\\text{eggs}}",
        "\\boxed{18 \\, \\text{km/h}}",
        "\\boxed{18\\text{ cm}^2}",
        "\\boxed{18 \\mathrm{~cm}}",
        "\\boxed{18 years old}",
        "\\boxed{18/hour}",
        "\\boxed{\\$18/\\text{hour}}",
        "\\boxed{18°}",
        "\\boxed{18\\%}",
        "The answer is \\$18.",
        # Markdown, and what follows
        "Answer: *18*",
        "The answer is `18`.",
        "#### __18__",
        "\\boxed{18.}",
        "\\boxed{18} That took me 3 steps.",
        "\\boxed{18} dollars, so in 2 days she has \\$36.",
    ],
)
def test_answers_as_models_write_them(completion):
    assert is_right(completion) == 1.0
    wrong = completion.replace("18", "19").replace("36", "38")
    assert is_right(wrong) == 0.0 and is_right(wrong, "19") == 1.0


def test_signs_and_fractions():
    assert is_right("\\boxed{–5}", "-5") == is_right("\\boxed{\\text{-5}}", "-5") == 1.0
    assert is_right("\\boxed{\\frac12}", "0.5") == is_right("\\boxed{\\dfrac{1}{2}}", "1/2") == 1.0
    assert is_right("\\boxed{18–5}", "-5") == 0.0


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
        # Several numbers
        "<answer>17</answer> 18",
        "18 <answer>none</answer>",
        "18 <answer></answer>",
        "<answer>18</answer><answer>17</answer>",
        "<answer>17 or 18</answer>",
        "<answer>(17, 18)</answer>",
        "#### 17 or 18",
        "#### 17, 18",
        "#### (17, 18)",
        "#### between 17 and 18",
        "\\boxed{17, 18}",
        "\\boxed{18 \\text{ or } 19}",
        "\\boxed{18 \\text{ dollars and } 50 \\text{ cents}}",
        "\\boxed{\\text{17 or 18}}",
        "\\boxed{18 dollars and fifty cents}",
        "\\boxed{x = 18, y = 19}",
        # Other numbers
        "\\boxed{18.5}",
        "\\boxed{\\text{18.5}}",
        "\\boxed{18\\text{.5}}",
        "\\boxed{1\\text{8}}",
        "\\boxed{18 pi}",
        "\\boxed{18 million}",
        "\\boxed{18x}",
        "\\boxed{18^2}",
        "\\boxed{x > 18}",
        "\\boxed{\\text{not }18}",
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
