"""The comparison on the embedded task: which runs it makes, that it makes them, and what it says of them."""

import gzip
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.frontier import make_all
from support.recipe import make_settings

from proma_trl.recipes import frontier, frontier_report
from proma_trl.recipes.frontier_plan import ARMS, PRETRAINED, PROTOCOL, REGIMES, Block, Plan, Run, read_runs
from proma_trl.recipes.frontier_summary import score_all
from proma_trl.recipes.gsm8k import GSM8KArguments
from proma_trl.recipes.sums import SumsArguments
from proma_trl.recipes.training import parse


def test_tuning_extends_edges_then_tries_the_parameter():
    # Best at 3.2e-6, below the grid; there, the last value is better than the first
    plan = Plan([Block("on_policy", ["proma"])])
    scores = make_all(plan, lambda run: -abs(run.rate + 22) + 0.1 * run.value + run.seed)
    tuning = [run for run in scores if run.seed < 100]
    rates = [run.rate for run in tuning if run.value == 0 and run.seed == 0]
    assert sorted(rates) == [-24, -22, -20, -18, -16, -14]
    assert {(run.rate, run.value) for run in tuning if run.value} == {(-22, 1), (-22, 2)}
    assert plan.chosen(plan.blocks[0], "proma", scores) == (-22, 2)
    test = [run for run in scores if run.seed >= 100]
    assert [(run.rate, run.value, run.seed) for run in test] == [(-22, 2, seed) for seed in range(100, 110)]


def test_an_arm_without_a_parameter_gets_as_many_settings():
    plan = Plan([Block("on_policy", ["reinforce", "grpo"])])
    scores = make_all(plan, lambda run: -abs(run.rate + 17.2))
    for arm in ("reinforce", "grpo"):
        assert len({(r.rate, r.value) for r in scores if r.arm == arm and r.seed == 0}) == 6
    assert {run.rate for run in scores if run.arm == "reinforce"} == {-20, -19, -18, -17, -16, -14}
    assert plan.chosen(plan.blocks[0], "reinforce", scores) == (-17, 0)


def test_of_equal_settings_the_first_is_taken():
    plan = Plan([Block("on_policy", ["proma"])])
    scores = make_all(plan, lambda run: float(run.rate in (-18, -16)))
    assert plan.chosen(plan.blocks[0], "proma", scores) == (-18, 0)


def test_blocks_in_order_and_seeds_outside():
    plan = Plan([Block("on_policy", ["proma", "grpo"]), Block("stale", ["grpo"])])
    order = [*make_all(plan, lambda run: -abs(run.rate + 17.1))]
    assert [run.regime for run in order] == sorted(run.regime for run in order)
    tests = [run for run in order if run.seed >= 100]
    assert [(run.arm, run.seed) for run in tests[:4]] == [
        ("proma", 100),
        ("grpo", 100),
        ("proma", 101),
        ("grpo", 101),
    ]
    # No arm is tested before all arms of its block are tuned
    first = order.index(tests[0])
    assert all(run.seed < 100 for run in order[:first]) and {run.arm for run in order[:first]} == {"proma", "grpo"}


def test_settings_that_another_regime_has_chosen():
    plan = Plan([Block("on_policy", ["proma"]), Block("stale", ["proma"], test_seeds=[7, 8], tuned_in="on_policy")])
    scores = make_all(plan, lambda run: -abs(run.rate + 17.2))
    assert [run for run in scores if run.regime == "stale"] == [Run("stale", "proma", -18, 0, seed) for seed in (7, 8)]
    assert plan.missing({}) == plan.blocks[0].tuning("proma", {})


def test_the_plan_is_the_protocols():
    on_policy = [arm for block in PROTOCOL.blocks if block.regime == "on_policy" for arm in block.arms]
    assert sorted([*on_policy, "proma_dppo", "intra_dppo"]) == sorted(ARMS)
    (pretrained,) = PRETRAINED.blocks
    assert len(make_all(PRETRAINED, lambda run: 1.0)) == len(pretrained.arms) * (3 * 1 + 6) == 36
    assert [block.regime for block in PROTOCOL.blocks] == [
        "on_policy",
        "groups",
        "adamw",
        "on_policy",
        "sgd",
        "sgd_test",
        "stale",
        "stale",
        "stale",
        "stale",
        "stale",
        "on_policy",
        "on_policy",
    ]
    compared = [block for block in PROTOCOL.blocks if block.regime in ("on_policy", "stale")]
    assert all((*block.tuning_seeds, *block.test_seeds) == (0, 1, *range(100, 110)) for block in compared)
    assert all(len(arm.values) == (3 if arm.parameter else 0) for arm in ARMS.values())
    assert [Run("on_policy", "grpo", rate, 0, 0).learning_rate for rate in PROTOCOL.blocks[0].rates] == [
        1e-5,
        3.2e-5,
        1e-4,
        3.2e-4,
    ]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("arm", ARMS)
def test_options_are_those_of_the_recipe(regime, arm, tmp_path):
    for value in range(max(1, len(ARMS[arm].values))):
        run = Run(regime, arm, -16, value, 3)
        made = REGIMES[regime]
        config = ["--config", str(frontier.CONFIGS / made.config), *made.options.split(), "--model_name_or_path", "p"]
        recipe = {"gsm8k": GSM8KArguments, "sums": SumsArguments}[made.recipe]
        _, args, _ = parse(recipe, [*config, *run.options(), "--output_dir", str(tmp_path)], None)
        assert args.learning_rate == 1e-4 and args.seed == 3 and args.loss_type == "dapo"
        completions = 960 if regime == "pretrained" else 5120
        assert args.max_steps * args.gradient_accumulation_steps * 8 == completions * args.num_iterations
        assert args.max_steps * made.completions_a_step == completions
        assert args.max_steps == made.rollouts * args.num_iterations * (
            args.steps_per_generation // args.gradient_accumulation_steps
        )
        if ARMS[arm].parameter:
            assert getattr(args, ARMS[arm].parameter.removeprefix("--")) == ARMS[arm].values[value]
    assert re.fullmatch(rf"{regime}/{arm}_lr_0\.0001\S*_seed_3", run.name)


@pytest.fixture
def tiny(tmp_path):
    """A task and options with which a run takes a second."""
    settings = make_settings(tmp_path)
    (tmp_path / "out" / "task").mkdir(parents=True)
    shutil.move(settings["model_name_or_path"], tmp_path / "out" / "task" / "warm_start")
    shutil.move(settings["dataset_name"], tmp_path / "out" / "task" / "problems")
    (tmp_path / "out" / "task" / "complete").touch()
    names = ("max_steps", "num_generations", "max_completion_length")
    options = [text for name in names for text in (f"--{name}", str(settings[name]))]
    kwargs = json.dumps(settings["generation_kwargs"])
    options += ["--gradient_accumulation_steps", "2", "--steps_per_generation", "4", "--generation_kwargs", kwargs]
    source = frontier.embedded_task(tmp_path / "out" / "task")
    return tmp_path / "out", [*source, *options, "--eval_every", "1", "--kl_every", "1"]


def test_a_run_leaves_nothing_to_the_next(tiny):
    """In one process, the same run gives the same record after another one."""
    output, options = tiny
    runs = [Run("on_policy", "proma", -8, 0, 3), Run("on_policy", "reinforce_matched", -8, 0, 4)]
    found = [frontier.execute(run, output / "run", options) for run in (*runs, runs[0])]
    assert found[0]["curves"] == found[2]["curves"] != found[1]["curves"]
    assert found[0]["arm"] == "proma" and found[0]["seconds"] > 0
    curves = found[0]["curves"]
    assert [*curves["eval_accuracy"]] == ["0", "1", "2"] and [*curves["global_kl"]] == ["1", "2"]
    assert {path.name for path in (output / "run").iterdir()} == {"run.log", "metrics.jsonl"}


@pytest.mark.slow
def test_whole_comparison(tiny, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    output, options = tiny
    plan = Plan([Block("on_policy", ["proma", "reinforce"], [-10, -8], [0], [100], extends=False)])
    records = {}
    # What a killed process leaves
    (output / "runs.jsonl").write_text('{"regime": "on_pol')
    frontier.execute_all(plan, records, output, jobs=1, options=options, minutes=0)
    assert records == {} and (output / "runs.jsonl").read_text() == ""
    frontier.execute_all(plan, records, output, jobs=1, options=options, minutes=None)
    assert len(records) == 6 and records == read_runs(output / "runs.jsonl")
    assert all("Greedy accuracy" in (output / run.name / "run.log").read_text() for run in records)
    assert plan.missing(score_all(records)) == []
    assert "6 complete, 0 or more to come" in capsys.readouterr().out
    frontier.execute_all(plan, records, output, jobs=1, options=options, minutes=None)
    assert len((output / "runs.jsonl").read_text().splitlines()) == 6

    text = frontier_report.write_report(plan, records, output)
    assert "| `proma - reinforce` |" in text and "| `proma` |" in text


@pytest.mark.parametrize("held", ["output_dir", "known_runs"])
def test_runs_of_other_settings_are_not_mixed(held, tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "execute_all", lambda *arguments: None)
    monkeypatch.setattr(frontier, "write_report", lambda *arguments: "")
    monkeypatch.setattr(frontier, "embedded_task", lambda folder: [])
    monkeypatch.setattr(frontier, "INSTRUCTIONS", {})
    monkeypatch.setattr(frontier, "fingerprint", lambda policy: policies[-1])
    policies = ["a"]
    for folder in ("known", "out/task/warm_start"):
        (tmp_path / folder).mkdir(parents=True)
    runs = tmp_path / "known" / "runs.jsonl.gz"
    runs.write_bytes(gzip.compress(b""))
    folder = {"output_dir": tmp_path / "out", "known_runs": runs.parent}[held]
    options = ["--output_dir", str(tmp_path / "out"), "--known_runs", str(runs)]
    frontier.main(options)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert sorted(settings) == ["frontier_on_policy", "frontier_stale", "options", "policy"]
    assert settings["options"] == [] and settings["policy"] == "a"
    (folder / "settings.json").write_text(json.dumps(settings))
    frontier.main(options)
    (tmp_path / "out" / "settings.json").unlink()
    (folder / "settings.json").write_text(json.dumps(settings))
    policies.append("b")
    with pytest.raises(ValueError, match=rf"{folder.name} holds runs with other settings \(policy\)"):
        frontier.main(options)
    policies.append("a")
    settings["frontier_stale"]["max_steps"] += 1
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"{folder.name} holds runs with other settings \(frontier_stale\)"):
        frontier.main(options)


def test_the_instructions_are_chosen_before_the_task_is_made(tmp_path, monkeypatch):
    for name in frontier.INSTRUCTIONS:
        monkeypatch.setenv(name, "")  # what `main` sets ends with the test
    found = []
    monkeypatch.setattr(frontier, "write_task", lambda *arguments, **settings: found.append(dict(os.environ)))
    monkeypatch.setattr(frontier, "execute_all", lambda *arguments: None)
    monkeypatch.setattr(frontier, "write_report", lambda *arguments: "")
    (tmp_path / "task" / "warm_start").mkdir(parents=True)
    frontier.main(["--output_dir", str(tmp_path)])
    assert found[0]["ATEN_CPU_CAPABILITY"] == "avx2" and frontier.INSTRUCTIONS.items() <= found[0].items()


def test_fingerprint_is_of_the_weights_alone(tmp_path):
    weights = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(2)}
    found = []
    for i, changed in enumerate(({}, {"b": torch.tensor([0, 1e-7])}, {})):
        (tmp_path / str(i)).mkdir()
        save_file(weights | changed, tmp_path / str(i) / "model.safetensors", metadata={"run": str(i)})
        found.append(frontier.fingerprint(tmp_path / str(i)))
    assert found[0] == found[2] != found[1] and len(found[0]) == 16


def test_the_quick_version_has_the_embedded_task():
    with pytest.raises(ValueError, match="Leave out pretrained"):
        frontier.FrontierArguments(quick=True, pretrained="model")


@pytest.mark.slow
def test_a_run_that_fails_ends_the_comparison(tiny):
    output, options = tiny
    plan = Plan([Block("on_policy", ["proma"], [-8], [0], [100], extends=False)])
    with pytest.raises(ValueError, match="num_generations"):
        frontier.execute_all(plan, {}, output, 1, [*options, "--num_generations", "7"], None)
    assert (output / "runs.jsonl").read_text() == ""
