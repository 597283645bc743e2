import json
import os
import re
import sys

import pytest
import yaml
from support.recipe import ROOT, make_settings, planned_runs

from proma_trl.recipes import figure2
from proma_trl.recipes.gsm8k import GSM8KArguments
from proma_trl.recipes.training import make_parser

# In place of the recipe: leaves what a run leaves, and fails where it is told to
STUB = """
import json, os, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--output_dir"])
with open(folder.parent / "executed.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
rate, seed = float(options["--learning_rate"]), int(options["--seed"])
if options.get("--fails") == options["--algorithm"]:
    sys.exit("no such luck")
accuracy = {"proma": 0.5, "grpo": 0.4, "reinforce": 0.3}[options["--algorithm"]] - abs(rate - 1e-4) * 1000 + seed / 100
with open(folder / "metrics.jsonl", "a") as file:
    for step in range(int(options["--max_steps"]) + 1):
        values = {"eval_accuracy": accuracy, "kl/local": rate, "kl/global": 2 * rate, "entropy": 1.0, "step": step}
        file.write(json.dumps(values) + "\\n")
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(figure2, "RECIPE", tmp_path / "stub.py")
    return ["--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--learning_rate", "1e-4"]


def executed(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("executed.txt"))


def test_comparison(tmp_path, stub, capsys):
    figure2.main([*stub, "--seeds", "0", "2", "--jobs", "2"])
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["proma", "grpo", "reinforce"]
    assert summary["proma"] == pytest.approx(
        {
            "eval_accuracy": 0.51,
            "eval_accuracy_sd": 0.02 / 2**0.5,
            "local_kl": 1e-4,
            "local_kl_sd": 0,
            "global_kl": 2e-4,
            "global_kl_sd": 0,
            "entropy": 1,
            "entropy_sd": 0,
        }
    )
    assert (out / "figure2.png").is_file() and (out / "figure2.svg").is_file()
    printed = capsys.readouterr()
    assert "| proma | 0.51 ± 0.014 |" in printed.out
    folders = re.findall("^Complete: (.*)$", printed.out, re.MULTILINE)
    assert sorted(folders) == sorted(str(path.parent) for path in out.rglob("complete")) and len(folders) == 6
    # The bar is for terminals
    assert printed.err == "" and "\r" not in printed.out


def test_complete_runs_are_not_run_again(tmp_path, stub):
    options = [*stub, "--seeds", "0", "1"]
    with pytest.raises(RuntimeError, match=r"(?s)--algorithm grpo.*exit code 1\..*run\.log.*no such luck"):
        figure2.main([*options, "--fails", "grpo"])
    begun, complete = executed(tmp_path), len(list((tmp_path / "out").rglob("complete")))
    assert begun < 6
    # Without --fails, the settings are others; the comparison refuses to mix them
    with pytest.raises(ValueError, match=r"seed_0.proma holds a run with other settings \(--fails grpo\)"):
        figure2.main(options)
    # What has failed has left no record that would be appended to
    (tmp_path / "stub.py").write_text(STUB.replace('"--fails"', '"--fails_no_more"'))
    figure2.main([*options, "--fails", "grpo"])
    assert executed(tmp_path) == begun + 6 - complete
    figure2.main([*options, "--fails", "grpo"])
    assert executed(tmp_path) == begun + 6 - complete
    lines = (tmp_path / "out" / "seed_0" / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5


def test_interrupted_run_goes_on_from_its_checkpoint(tmp_path, stub):
    folder = tmp_path / "out" / "seed_0" / "proma"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"entropy": 1.0, "step": 1}\n')
    figure2.main([*stub, "--seeds", "0", "--algorithms", "proma"])
    assert "--resume_from_checkpoint true" in (folder.parent / "executed.txt").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1 + 5


def test_further_algorithms(tmp_path, stub):
    figure2.main(
        [
            *stub,
            "--seeds",
            "0",
            "--algorithms",
            "exact",
            "unbounded",
            "proma --projection_sweeps 4 --learning_rate 2e-4",
        ]
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary) == ["exact", "unbounded", "proma_projection_sweeps_4_learning_rate_2e-4"]
    settings = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("settings.json")}
    assert settings["exact"]["--projection"] == "exact"
    assert settings["unbounded"]["--projection_bound"] == "inf"
    assert settings["proma_projection_sweeps_4_learning_rate_2e-4"]["--learning_rate"] == "2e-4"


def test_sweep_chooses_by_the_mean_over_algorithms(tmp_path, stub, capsys):
    figure2.main([*stub, "--learning_rates", "1e-5", "1e-4", "1e-3", "--seeds", "3"])
    result = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert result["chosen"] == 1e-4
    assert result["mean_eval_accuracy"]["0.0001"] == pytest.approx(0.43)
    assert result["best_of_each"] == {"proma": 1e-4, "grpo": 1e-4, "reinforce": 1e-4}
    assert result["learning_rates"]["0.001"]["grpo"]["eval_accuracy"] == pytest.approx(0.4 - 0.9 + 0.03)
    assert (tmp_path / "out" / "sweep.svg").is_file()
    assert "Chosen: 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize("own_policy", [True, False])
def test_generated_problems(tmp_path, stub, monkeypatch, own_policy):
    """With a policy of one's own, no other is trained, and the Hub stays within reach."""
    made = []
    monkeypatch.setattr(
        figure2, "write_task", lambda folder, **kwargs: (made.append("task"), folder.mkdir(parents=True))
    )
    monkeypatch.setattr(
        figure2, "write_problems", lambda folder, **kwargs: (made.append("problems"), folder.mkdir(parents=True))
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    options = [] if own_policy else ["--model_name_or_path", "some/model"]
    for _ in range(2):
        figure2.main([*stub, *options, "--word_problems", "short", "--seeds", "0", "--algorithms", "proma"])
    assert made == ["task" if own_policy else "problems"]
    task = tmp_path / "out" / "task"
    settings = json.loads((tmp_path / "out" / "seed_0" / "proma" / "settings.json").read_text())
    assert settings["--dataset_name"] == str(task / "problems")
    assert settings["--model_name_or_path"] == (str(task / "warm_start") if own_policy else "some/model")
    assert os.environ["HF_HUB_OFFLINE"] == ("1" if own_policy else "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "-1"], "max_steps is not set"),
        (["--algorithms", "ppo"], "'ppo' is none of proma, proma_intra, proma_both, grpo"),
        (["--seeds", "1", "1"], r"seeds=\[1, 1\] has to name at least one, and none twice"),
        (["--jobs", "0"], "jobs=0 has to be at least 1"),
    ],
)
def test_errors(tmp_path, stub, options, message):
    with pytest.raises(ValueError, match=message):
        figure2.main([*stub, *options])


@pytest.mark.parametrize("config", sorted((ROOT / "recipes" / "configs").glob("figure2*.yaml")), ids=lambda p: p.stem)
def test_configs_are_valid(tmp_path, monkeypatch, config):
    """What they hand to the recipe, it takes."""
    given = planned_runs(monkeypatch)
    figure2.main(["--config", str(config), "--output_dir", str(tmp_path)])
    assert len(given) >= 3
    for run in given:
        algorithm = run.settings()["--algorithm"]
        options = [*run.options, "--use_cpu", "true", "--output_dir", str(tmp_path)]
        parser = make_parser(GSM8KArguments, algorithm)
        args, training_args, model_args, *_ = parser.parse_args_and_config(options)
        assert args.kl_every > 0 and args.eval_every > 0
        assert model_args.model_name_or_path
        assert training_args.generation_batch_size % training_args.num_generations == 0


@pytest.mark.slow
def test_real_runs(tmp_path, monkeypatch):
    """The recipe itself, from a YAML file, two runs at a time."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    settings = make_settings(tmp_path) | {"algorithms": ["proma", "grpo"], "seeds": [0], "jobs": 2}
    settings |= {"output_dir": str(tmp_path / "out"), "kl_every": 1, "kl_exact": True, "logging_steps": 1}
    # Handed to the recipe as text
    del settings["projection_bound"], settings["generation_kwargs"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["figure2.py"])
    figure2.main(["--config", str(tmp_path / "config.yaml"), "--max_completion_length", "4"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary) == ["proma", "grpo"]
    for values in summary.values():
        assert set(values) == {"eval_accuracy", "local_kl", "global_kl", "entropy"}
        assert 0 <= values["eval_accuracy"] <= 1
        assert values["global_kl"] >= 0 and values["entropy"] > 0
