"""The task of pretrained models in the comparison: sums, and how a run on them is evaluated."""

import pytest
from huggingface_hub import ModelCard
from support.hub import card_errors
from support.recipe import make_settings, read_metrics, write_config

from proma_trl.recipes import sums


def test_problems_are_distinct_and_held_out():
    train, held_out = sums.make_sums()
    assert (len(train), len(held_out)) == (sums.TRAIN, sums.HELD_OUT)
    prompts = [*train["prompt"], *held_out["prompt"]]
    assert len(set(prompts)) == sums.TRAIN + sums.HELD_OUT
    for row in (*train, *held_out):
        shown, _, question = row["prompt"].rpartition("\n")
        a, b = map(int, question.removesuffix(" =").split(" + "))
        assert shown == "38 + 25 = 63\n71 + 6 = 77" and 10 <= a <= 99 and 2 <= b <= 29
        assert int(row["answer"]) == a + b and (a, b) not in sums.EXAMPLES


def sums_settings(folder):
    """Those of a small run, without what sums have no use for."""
    unused = ("dataset_name", "format_reward_weight")
    return {name: value for name, value in make_settings(folder).items() if name not in unused}


def test_run(tmp_path):
    settings = sums_settings(tmp_path)
    config = write_config(tmp_path, settings | {"eval_samples": 40, "per_device_eval_batch_size": 250})
    sums.main(["--config", config, "--algorithm", "proma"])
    records = read_metrics(settings["output_dir"])
    accuracies = [(record["step"], record["eval_accuracy"]) for record in records if "eval_accuracy" in record]
    assert [step for step, _ in accuracies] == [0, 1, 2]
    assert all((40 * accuracy).is_integer() for _, accuracy in accuracies)
    card = ModelCard.load(f"{settings['output_dir']}/README.md")
    assert card_errors(card.content) == [] and "datasets" not in card.data.to_dict()
    final = [(record["step"], record["eval_final_accuracy"]) for record in records if "eval_final_accuracy" in record]
    assert [step for step, _ in final] == [2]
    assert (sums.HELD_OUT * final[0][1]).is_integer()


def test_run_without_evaluation(tmp_path):
    settings = sums_settings(tmp_path)
    sums.main(["--config", write_config(tmp_path, settings | {"eval_every": 0, "max_steps": 1})])
    assert not any(name.startswith("eval") for record in read_metrics(settings["output_dir"]) for name in record)


@pytest.mark.parametrize("name, value", [("eval_every", -1), ("eval_samples", 0), ("eval_samples", 501)])
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        sums.SumsArguments(**{name: value})
