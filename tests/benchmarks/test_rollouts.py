"""Benchmarks train on rollouts of drawn lengths as TRL would, and count the positions that the model runs on."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rollouts
import step_time
from lengths import Lengths, Tokens, num_positions

TINY = ["--hidden", "64", "--layers", "1", "--vocabulary", "256", "--device", "cpu", "--sequences", "4"]
TINY += ["--microbatches", "2", "--prompt-lengths", "lognormal:4:0.4:9"]
COMPLETIONS = Lengths(8.0, 0.7, 24)


def options(*more):
    return rollouts.make_rollout_parser("").parse_args([*TINY, *more])


def widest(steps):
    """Positions of a padded rollout for each real token."""
    sequences = [
        Tokens(len(prompt), len(completion))
        for prompt, completion in zip(*list(steps.rollouts.sample([], None).values())[:2], strict=True)
    ]
    return num_positions(sequences) / steps.rollouts.num_tokens


def test_a_rollout():
    found = rollouts.Rollouts(options("--steps", "2"), COMPLETIONS, 0.5)
    sample = found.sample([], None)
    assert found.size == 16 and len(sample["prompt_ids"]) == len(sample["completion_ids"]) == 16
    assert sum(map(len, sample["prompt_ids"] + sample["completion_ids"])) == found.num_tokens
    assert [len(x) for x in sample["logprobs"]] == [len(x) for x in sample["completion_ids"]]
    groups = [(sample["prompt_ids"][i : i + 4], found.rewards([])[i : i + 4]) for i in range(0, 16, 4)]
    assert all(prompts == [prompts[0]] * 4 for prompts, _ in groups)
    assert sorted(len(set(rewards)) for _, rewards in groups) == [1, 1, 4, 4]
    found.next(1)
    assert found.sample([], None) != sample
    found.next(0)
    assert found.sample([], None) == sample


@pytest.mark.parametrize("algorithm", ["grpo", "proma", "dppo"])
def test_steps_on_rollouts(algorithm):
    """Positions are those of the padded rollout, and half of the groups have no advantage."""
    steps = rollouts.make_rollout_steps(options(), COMPLETIONS, algorithm, "padded", 0.5)
    before = [param.clone() for param in steps.trainer.model.parameters()]
    steps()  # with checks of the first microbatch
    assert any((a != b).any() for a, b in zip(before, steps.trainer.model.parameters(), strict=True))
    turn = steps()
    assert turn.positions == pytest.approx(widest(steps))
    assert turn.seconds > 0
    advantages = torch.cat([inputs["advantages"] for inputs in steps.trainer._buffered_inputs])
    assert (advantages == 0).sum() == 4
    # No earlier rollout is left
    assert steps.trainer._step == 4


def test_several_steps_on_a_rollout():
    """TRL then runs the policy before the first of them, too."""
    steps = rollouts.make_rollout_steps(options("--steps", "2"), COMPLETIONS, "grpo")
    assert steps().positions == pytest.approx(2 * widest(steps))


def test_trainers_get_the_same_rollouts():
    one, other = (rollouts.make_rollout_steps(options(), COMPLETIONS, name) for name in ("grpo", "reinforce"))
    for steps in (one, other):
        steps()
    for inputs, others in zip(one.trainer._buffered_inputs, other.trainer._buffered_inputs, strict=True):
        assert torch.equal(inputs["completion_ids"], others["completion_ids"])


def test_layouts(monkeypatch, capsys):
    known = {"max_grad_norm": 7.0}
    monkeypatch.setattr(rollouts, "LAYOUTS", {"padded": {"neither": 1}, "trimmed": {"neither": 1}, "ordered": known})
    arguments = options("--layout", "padded", "trimmed", "ordered")
    assert list(rollouts.layouts(arguments)) == [("padded", {}), ("ordered", known)]
    assert "Left out: trimmed" in capsys.readouterr().out


def test_step_time(monkeypatch, capsys, tmp_path):
    more = ["--lengths", "12", "lognormal:8:0.7:24", "--layout", "padded", "--algorithm", "reinforce"]
    output = tmp_path / "step_time.json"
    monkeypatch.setattr(sys, "argv", ["step_time.py", *TINY, *more, "--repeats", "1", "--output", str(output)])
    step_time.main()
    printed = capsys.readouterr().out
    assert "positions" in printed and "lognormal:8:0.7:24" in printed
    written = json.loads(output.read_text())
    assert written["settings"]["lengths"] == [12, "lognormal:8:0.7:24"]
    rows = written["results"]
    assert [(row["length"], row["algorithm"], row.get("layout")) for row in rows] == [
        (12, "grpo", None),
        (12, "reinforce", None),
        ("lognormal:8:0.7:24", "grpo", "padded"),
        ("lognormal:8:0.7:24", "reinforce", "padded"),
    ]
    assert rows[2]["positions"] == rows[3]["positions"] > 1.0 and "positions" not in rows[0]


def test_a_method_that_needs_a_rollout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", *TINY, "--lengths", "12", "--algorithm", "dppo"])
    with pytest.raises(SystemExit):
        step_time.main()
    assert "dppo needs a rollout" in capsys.readouterr().err
