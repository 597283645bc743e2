import json

import pytest

from proma_trl.recipes import shown_steps, word_problems


def test_tally():
    solutions = ["3 + 4 = 7\n#### 7", "3 + 4 = 8\n#### 8", "#### 7", "#### 6", "#### 5"]
    found = shown_steps.tally(solutions, [1.0, 0.0, 1.0, 0.0, 0.0])
    assert found == {
        "steps": 0.4,
        "right": 0.4,
        "right_with_steps": 0.5,
        "right_without_steps": pytest.approx(1 / 3),
    }
    assert shown_steps.tally(["#### 7"], [1.0])["right_with_steps"] is None


def test_what_the_habit_explains():
    before = {"steps": 0.25, "right_with_steps": 0.8, "right_without_steps": 0.2}
    after = {"steps": 0.75, "right_with_steps": 0.9, "right_without_steps": None}
    # Accuracies as before, and how often steps are written as after
    assert shown_steps.explained(before, after) == pytest.approx(0.75 * 0.8 + 0.25 * 0.2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Problems, and the folder of a policy with random weights."""
    folder = tmp_path_factory.mktemp("policy")
    problems = word_problems.make_problems(40, seed=0)
    tokenizer = word_problems.make_tokenizer(problems)
    tokenizer.save_pretrained(folder)
    word_problems.make_policy(tokenizer).save_pretrained(folder)
    return folder, problems[:3]


def test_a_policy_that_must_not_begin_with_the_answer(saved, monkeypatch):
    folder, problems = saved
    asked = []

    def complete(policy, tokenizer, questions, **options):
        asked.append(options)
        # A policy that writes the answer at once unless it must not
        right = [problem["answer"] if "begin_suppress_tokens" in options else "#### 1" for problem in problems]
        return [text for text in right for _ in range(options.get("num_return_sequences", 1))]

    monkeypatch.setattr(shown_steps, "complete", complete)
    found = shown_steps.look_at(folder, problems)
    assert set(shown_steps.COLUMNS) <= set(found)
    assert found["steps"] == found["greedy_steps"] == 0.0 and found["right_with_steps"] is None
    assert found["forced_right"] == found["forced_greedy_right"] == 1.0
    assert [options["do_sample"] for options in asked] == [True, False, True, False]
    table = shown_steps.table({"before": found})
    assert table.splitlines()[2].startswith("| before | 0.000 |")


def test_suppressed_tokens_do_not_come_first(saved):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, problems = saved
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    questions = [problem["question"] for problem in problems]
    others = [i for i in range(len(tokenizer)) if i != tokenizer.convert_tokens_to_ids("has")]
    for options in ({"do_sample": False}, {"do_sample": True}):
        solutions = shown_steps.complete(policy, tokenizer, questions, begin_suppress_tokens=others, **options)
        assert [solution.split()[0] for solution in solutions] == ["has"] * 3


def test_from_policies_that_are_there(saved, tmp_path, monkeypatch, capsys):
    folder, problems = saved
    task, trained = tmp_path / "task", tmp_path / "reinforce_seed_3"
    (task / "problems").mkdir(parents=True)
    (task / "problems" / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (task / "warm_start").symlink_to(folder)
    (task / "complete").touch()
    trained.symlink_to(folder)
    found = {"steps": 0.5, "right_with_steps": 0.6, "right_without_steps": 0.2}
    monkeypatch.setattr(shown_steps, "INSTRUCTIONS", {})
    monkeypatch.setattr(shown_steps, "look_at", lambda policy, rows: dict.fromkeys(shown_steps.COLUMNS, 0.5) | found)
    shown_steps.main(["--output_dir", str(tmp_path), "--seed", "3"])
    summary = json.loads((tmp_path / "shown_steps.json").read_text())
    assert summary["run"] == "on_policy/reinforce_lr_3.2e-05_seed_3" and len(summary["policy"]) == 16
    assert summary["explained"] == pytest.approx(0.4) and "0.400" in capsys.readouterr().out
