""""""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import is_deepspeed_available
from peft import PeftModel
from support.recipe import (
    ROOT,
    make_settings,
    read_metrics,
    read_weights,
    run_recipe,
    write_config,
)
from support.tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from proma_trl.recipes import gsm8k as recipe
from proma_trl.recipes import training

CARD_NAMES = {
    "proma": "PROMA",
    "proma_intra": "Intra-PROMA",
    "proma_both": "Intra-PROMA and PROMA",
    "dppo": "DPPO",
    "reinforce": "REINFORCE",
    "grpo": "GRPO",
    "reinforce_matched": "REINFORCE with the step length of PROMA",
}


@pytest.mark.parametrize("algorithm", CARD_NAMES)
def test_run(tmp_path, settings, algorithm, capsys):
    arguments = ["--config", write_config(tmp_path, settings), "--algorithm", algorithm, "--eval_samples", "3"]
    if algorithm == "proma":
        run = run_recipe(*arguments)
        assert run.returncode == 0, run.stderr
        printed = run.stdout
    else:  # in this process, which is done sooner
        recipe.main(arguments)
        printed = capsys.readouterr().out
    assert "Greedy accuracy: 0.0% before training" in printed

    trained, initial = read_weights(settings["output_dir"]), read_weights(settings["model_name_or_path"])
    assert set(trained) == set(initial)
    assert any(not torch.equal(trained[name], initial[name]) for name in trained)
    tokenizer = AutoTokenizer.from_pretrained(settings["output_dir"])
    assert tokenizer.chat_template == make_tokenizer().chat_template

    records = read_metrics(settings["output_dir"])
    assert [record["step"] for record in records if "eval_accuracy" in record] == [0, 1, 2]
    train = [record for record in records if "reward" in record]
    assert [record["step"] for record in train] == [1, 2]
    assert all(record["reward_std"] > 0 for record in train)
    assert {"rewards/accuracy_reward/mean", "rewards/format_reward/mean", "loss", "grad_norm"} <= set(train[0])

    card = (Path(settings["output_dir"]) / "README.md").read_text()
    assert f"trained with {CARD_NAMES[algorithm]}" in card
    # The card is for others, who do not have this machine's folders.
    assert str(tmp_path) not in card


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path)


NEEDS_DEEPSPEED = pytest.mark.skipif(not is_deepspeed_available(), reason="needs deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["cpu_2_ranks", *(pytest.param(zero, marks=NEEDS_DEEPSPEED) for zero in ("zero2", "zero3"))]
)
def test_many_ranks(tmp_path, settings, backend):
    launcher = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{backend}.yaml"), "--main_process_port", "0"]
    if backend != "cpu_2_ranks":
        accelerate = yaml.safe_load(Path(launcher[1]).read_text())
        accelerate |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
        launcher[1] = str(tmp_path / "accelerate.yaml")
        Path(launcher[1]).write_text(yaml.safe_dump(accelerate))
    settings |= {"bf16": False, "save_strategy": "steps", "save_steps": 1}
    run = run_recipe("--config", write_config(tmp_path, settings), launcher=launcher)
    assert run.returncode == 0, run.stderr

    trained, initial = read_weights(settings["output_dir"]), read_weights(settings["model_name_or_path"])
    assert set(trained) == set(initial)
    assert any(not torch.equal(trained[name], initial[name]) for name in trained)
    records = read_metrics(settings["output_dir"])
    assert [record["step"] for record in records if "eval_accuracy" in record] == [0, 1, 2]
    train = [record for record in records if "reward" in record]
    # Completions of both ranks: 2 x 2 microbatches of 8 a step, of one token each
    assert [record["completions/mean_length"] for record in train] == [1, 1]
    assert all(record["projection/norm_ratio"] > 0 for record in train)

    run = run_recipe(
        "--config",
        str(tmp_path / "config.yaml"),
        "--resume_from_checkpoint",
        f"{settings['output_dir']}/checkpoint-1",
        launcher=launcher,
    )
    assert run.returncode == 0, run.stderr
    resumed = read_weights(settings["output_dir"])
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)


def test_baselines_differ_from_proma_in_one_setting(tmp_path, settings, monkeypatch):
    class Constructed(Exception):
        pass

    def remember(name):
        def construct(**arguments):
            raise Constructed(name, arguments)

        return construct

    monkeypatch.setattr(training, "PROMATrainer", remember("PROMATrainer"))
    monkeypatch.setattr(training, "GRPOTrainer", remember("GRPOTrainer"))
    config, seen = write_config(tmp_path, settings), {}
    for algorithm in ("proma", "reinforce", "grpo"):
        with pytest.raises(Constructed) as constructed:
            recipe.main(["--config", config, "--algorithm", algorithm])
        seen[algorithm] = constructed.value.args
    assert [seen[algorithm][0] for algorithm in seen] == ["PROMATrainer", "PROMATrainer", "GRPOTrainer"]
    assert seen["proma"][1]["args"].projection == "exact"
    assert seen["proma"][1]["args"].projection_bound is None
    assert seen["reinforce"][1]["args"].projection == "none"
    assert not hasattr(seen["grpo"][1]["args"], "projection")
    assert (seen["grpo"][1]["args"].epsilon, seen["grpo"][1]["args"].beta) == (0.2, 0.0)
    for _, arguments in seen.values():
        assert arguments["args"].reward_weights == [1.0, 0.5]
        assert [function.__name__ for function in arguments["reward_funcs"]] == ["accuracy_reward", "format_reward"]
        assert arguments["train_dataset"]["answer"] == [str(n + 1) for n in range(8)]
        assert arguments["args"].learning_rate == 1e-2


def test_algorithm_in_the_file(tmp_path, settings):
    config = write_config(tmp_path, settings | {"algorithm": "grpo"})
    assert training.choose_algorithm(["--config", config]) == "grpo"
    assert training.choose_algorithm(["--config", config, "--algorithm", "reinforce"]) == "reinforce"
    assert training.choose_algorithm(["--config", config, "--algorithm=reinforce"]) == "reinforce"
    assert training.choose_algorithm([]) == "proma"


def test_adapters(tmp_path, settings):
    config = write_config(tmp_path, settings | {"max_steps": 1, "eval_every": 0})
    recipe.main(["--config", config, "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "down_proj"])
    base = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, settings["output_dir"])
    trained = {name: weight for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert len(trained) == 4
    assert any(weight.abs().max() > 0 for weight in trained.values())
    assert not any("eval_accuracy" in record for record in read_metrics(settings["output_dir"]))


def test_resumed_run_ends_like_one_that_was_not_stopped(tmp_path, settings):
    settings |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "eval_every": 2}
    config = write_config(tmp_path, settings)
    recipe.main(["--config", config])
    weights, records = read_weights(settings["output_dir"]), read_metrics(settings["output_dir"])
    steps = [record["step"] for record in records]
    assert steps == [0, 1, 2, 2, 3, 3, 3]

    recipe.main(["--config", config, "--resume_from_checkpoint", f"{settings['output_dir']}/checkpoint-1"])
    resumed_weights, resumed_records = read_weights(settings["output_dir"]), read_metrics(settings["output_dir"])
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert [record["step"] for record in resumed_records] == steps
    for record, resumed_record in zip(records, resumed_records, strict=True):
        assert record.get("reward") == resumed_record.get("reward")
        assert record.get("eval_accuracy") == resumed_record.get("eval_accuracy")

    # Resuming a finished run from its last checkpoint has nothing left to do.
    recipe.main(["--config", config, "--resume_from_checkpoint", "true"])
    assert all(torch.equal(weights[name], weight) for name, weight in read_weights(settings["output_dir"]).items())


def test_overlaps_and_whole_groups(tmp_path, settings, monkeypatch):
    settings |= {"overlap_every": 1, "whole_groups": True, "eval_every": 0}
    entered = []
    monkeypatch.setattr(training, "rollouts_in_order", lambda: entered.append(True) or nullcontext())
    recipe.main(["--config", write_config(tmp_path, settings), "--max_steps", "1"])
    assert entered == [True]
    record = read_metrics(settings["output_dir"])[0]
    assert 0 < record["update/overlap"] < 1 and 0 < record["update/last_tensor_overlap"] < 1


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--config", "--algorithm", "--dataset_name", "--eval_every", "--format_reward_weight"):
        assert f"\n  {option} " in printed
    for option in ("--projection", "--num_generations", "--learning_rate", "--model_name_or_path", "--use_peft"):
        assert f"\n  {option} " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--algorithm", "ppo"],
            "--algorithm: 'ppo' is none of proma, proma_intra, proma_both, isopo, dppo, reinforce,",
        ),
        (["--config", "nowhere.yaml"], "--config: there is no file 'nowhere.yaml'"),
    ],
)
def test_errors_of_the_command_line(capsys, arguments, message):
    with pytest.raises(SystemExit):
        recipe.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_name_or_path": None}, ValueError, "model_name_or_path is not set. Set it"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights is not used here. Set format_reward_weight"),
        ({"dataset_name": "./nowhere"}, FileNotFoundError, r"dataset_name='./nowhere' is neither .* Set dataset_name"),
        ({"dataset_test_split": "validation"}, ValueError, "has no split 'validation'.* eval_every=0"),
        ({"max_prompt_length": 3}, ValueError, "max_prompt_length=3 leaves no problem.* Raise max_prompt_length"),
        ({"eval_every": -1}, ValueError, "eval_every=-1 is negative. Set it to 0"),
        ({"eval_samples": 0}, ValueError, "eval_samples=0 is not positive. Leave it out"),
        ({"epochs": 1}, ValueError, "config.yaml: unknown setting `epochs`"),
    ],
)
def test_errors_of_the_settings(tmp_path, settings, changes, error, message):
    with pytest.raises(error, match=message):
        recipe.main(["--config", write_config(tmp_path, settings | changes)])


# Those of the comparisons have tests of their own
CONFIGS = [
    path
    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
    if not path.stem.startswith(("figure2", "frontier"))
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("algorithm", CARD_NAMES)
def test_configs_are_valid(tmp_path, config, algorithm):
    # bf16 on a machine without a GPU needs use_cpu.
    arguments = ["--config", str(config), "--algorithm", algorithm, "--use_cpu", "--output_dir", str(tmp_path)]
    parser = training.make_parser(recipe.GSM8KArguments, algorithm)
    args, training_args, model_args, *_ = parser.parse_args_and_config(arguments)
    assert args.algorithm == algorithm
    assert model_args.model_name_or_path
    assert training_args.generation_batch_size % training_args.num_generations == 0
