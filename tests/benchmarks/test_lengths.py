"""Layouts of microbatches hold every sequence once, and their positions are those of brute force."""

import argparse
import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import lengths
from lengths import CASES, LAYOUTS, Lengths, Tokens


def sample(count, seed=0, text="lognormal:30:0.8:200"):
    return lengths.draw_rollout(Lengths.parse(text), Lengths.parse("lognormal:10:0.4:40"), count, 1, seed)


def test_distributions():
    found = Lengths.parse("lognormal:180:0.6:1024")
    assert found == Lengths(180.0, 0.6, 1024)
    generator = random.Random(0)
    drawn = sorted(found.draw(generator) for _ in range(4001))
    assert drawn[2000] == pytest.approx(180, rel=0.05)
    # One standard deviation above the median
    assert drawn[round(4001 * 0.8413)] == pytest.approx(180 * math.exp(0.6), rel=0.06)
    assert drawn[0] >= 1 and drawn[-1] == 1024
    assert {Lengths.parse("constant:7").draw(generator) for _ in range(5)} == {7}


@pytest.mark.parametrize(
    "text", ["lognormal:180:0.6", "lognormal:-1:0.6:10", "lognormal:a:0.6:10", "lognormal:9:nan:10", "constant:0", "7"]
)
def test_what_is_no_distribution(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"neither lognormal:MEDIAN:SIGMA:CAP.*nor constant:T"):
        Lengths.parse(text)


def test_a_group_shares_a_prompt():
    rollout = lengths.draw_rollout(Lengths.parse("constant:5"), Lengths.parse("lognormal:60:0.5:900"), 24, 8, 1)
    prompts = [x.prompt for x in rollout]
    assert [prompts[i : i + 8] for i in (0, 8, 16)] == [[prompts[i]] * 8 for i in (0, 8, 16)]
    assert len(set(prompts)) == 3
    with pytest.raises(ValueError, match="20 sequences are no multiple of groups of 8"):
        lengths.draw_rollout(Lengths.parse("constant:5"), Lengths.parse("constant:5"), 20, 8, 0)


def test_positions():
    step = [Tokens(3, 10), Tokens(5, 2)]
    assert lengths.num_positions(step) == 2 * (5 + 10)
    assert lengths.aligned_positions(step) == 2 * 13
    assert lengths.real_tokens(step) == 20


def test_layouts_of_a_rollout():
    """What a step trains on stays what TRL chose, and each layout runs fewer positions than the one before."""
    rollout = sample(64)
    totals = {}
    for name in LAYOUTS:
        steps = lengths.step_positions(rollout, name, 32, 4, seed=3)
        assert [len(step) for step in steps] == [8, 8]
        totals[name] = sum(map(sum, steps))
    assert totals["padded"] == lengths.num_positions(rollout)
    assert totals["packed"] == lengths.real_tokens(rollout)
    assert totals["padded"] > totals["trimmed"] > totals["ordered"] > totals["aligned"] > totals["packed"]


def test_without_padding_all_layouts_are_alike():
    rollout = [Tokens(4, 9)] * 32
    for name in LAYOUTS:
        assert sum(map(sum, lengths.step_positions(rollout, name, 16, 4, 0))) == 32 * 13


def test_waiting():
    one, other = [[10, 30], [20, 20]], [[30, 10], [20, 40]]
    # The means are 40 and 50 positions, and the second step waits for 60
    assert lengths.waits([one, one], 0) == (1.0, 1.0)
    assert lengths.waits([one, other], 0) == (100 / 90, (60 + 60) / 90)
    step = [list(range(1, 17))]
    assert lengths.waits([step] * 4, 0) == (1.0, 1.0)
    once, always = lengths.waits([step] * 4, 0, same_order=False)
    assert once == 1.0 and always > 1.3


def test_readme_table():
    """Positions for each real token of padded, trimmed and ordered steps, as the README has them."""
    want = [(4.1, 2.0, 1.21), (5.3, 2.1, 1.24), (3.4, 2.3, 1.15)]
    for (completions, prompts), row in zip(CASES, want, strict=True):
        found = lengths.mean_positions(completions, prompts, 1024, 8, 128, 8, 10, ("padded", "trimmed", "ordered"))
        assert found["padded"][0] == pytest.approx(row[0], abs=0.05)
        assert found["trimmed"][0] == pytest.approx(row[1], abs=0.05)
        assert found["ordered"][0] == pytest.approx(row[2], abs=0.005)


def test_command(capsys, monkeypatch):
    sizes = ["--sequences", "32", "--group", "4", "--step", "16", "--microbatch", "4", "--rollouts", "1"]
    monkeypatch.setattr(sys, "argv", ["lengths.py", "--lengths", "lognormal:20:0.6:99", *sizes])
    lengths.main()
    assert "positions a real token" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lengths.py", "--lengths", "constant:20", "--ranks", "2", *sizes])
    lengths.main()
    printed = capsys.readouterr().out
    assert "completions constant:20" in printed and "ordered, other orders" in printed
