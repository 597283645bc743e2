import importlib.util
import json
import math

import pytest
from huggingface_hub import EvalResult, ModelCard
from support.harness import LORA, make_trainer
from support.hub import card_errors
from support.recipe import make_settings, read_metrics, write_config
from support.repository import ROOT
from transformers import pipeline
from trl import GRPOTrainer

from proma_trl import PROMATrainer
from proma_trl.controls import MatchedLengthTrainer, RandomDirectionsTrainer
from proma_trl.recipes import gsm8k as recipe
from proma_trl.tools.data import load_gsm8k
from proma_trl.trainer.model_card import EVIDENCE, CardDataset, complete_model_card, final_result

PROMA, GRPO, TRL = "@article{abrahamsen2026proma", "@article{shao2024deepseekmath", "@software{vonwerra2020trl"


@pytest.mark.parametrize(
    ("algorithm", "name", "citations", "settings"),
    [
        ("proma", "PROMA", {PROMA, GRPO, TRL}, {"projection": "'exact'", "projection_bound": "None"}),
        ("reinforce", "REINFORCE", {GRPO, TRL}, {"projection": "'none'"}),
        ("grpo", "GRPO", {GRPO, TRL}, {"epsilon": "0.2", "beta": "0.0"}),
    ],
)
def test_a_run_of_the_recipe(tmp_path, monkeypatch, algorithm, name, citations, settings):
    run = make_settings(tmp_path)
    problems = run["dataset_name"]
    monkeypatch.setattr(recipe, "load_gsm8k", lambda name, *rest: load_gsm8k(problems, *rest))
    run |= {"dataset_name": "openai/gsm8k", "kl_every": 1}
    recipe.main(["--config", write_config(tmp_path, run), "--algorithm", algorithm])

    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card_errors(card.content) == []
    data, text = card.data, card.text
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("transformers", "text-generation", "openai/gsm8k")
    assert {"trl", algorithm} <= set(data.tags) and ("proma" in data.tags) == (algorithm == "proma")
    assert data.base_model is None and data.license is None and "licence" not in data
    records = read_metrics(tmp_path / "run")
    accuracies = [record["eval_accuracy"] for record in records if "eval_accuracy" in record]
    assert data.eval_results == [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="openai/gsm8k",
            dataset_name="openai/gsm8k",
            dataset_config="main",
            dataset_split="test[:4]",
            metric_type="accuracy",
            metric_name="Accuracy on held-out problems, greedy decoding",
            metric_value=accuracies[-1],
        )
    ]

    assert f"trained with {name}" in text and "huggingface.co/None" not in text
    assert {citation for citation in (PROMA, GRPO, TRL) if text.count(citation) == 1} == citations
    assert ("| `projection_sweeps` |" in text) == (algorithm == "proma")
    assert text.count("### What is known of the method") == text.count(EVIDENCE["PROMA"]) == (algorithm == "proma")
    for setting, value in (settings | {"learning_rate": "0.01", "gradient_accumulation_steps": "2"}).items():
        assert f"| `{setting}` | `{value}` |" in text
    assert f"| {accuracies[0]:.4g} (step 0) | {accuracies[-1]:.4g} (step 2) |" in text
    for metric in ("reward", "entropy", "kl/local", "kl/global"):
        first, last = (record[metric] for record in records if metric in record)
        assert f"| {first:.4g} (step 1) | {last:.4g} (step 2) |" in text
    assert "Held-out problems: `test[:4]` of `openai/gsm8k`." in text
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert ("](figure.png)" in text, (tmp_path / "run" / "figure.png").is_file()) == (drawn, drawn)

    generator = pipeline("text-generation", model=str(tmp_path / "run"), device="cpu")
    message = {"role": "user", "content": "What is 2 + 1?"}
    (output,) = generator([message], max_new_tokens=4, return_full_text=False)
    assert isinstance(output["generated_text"], str)


def write_card(folder, log_history=(), **kwargs):
    """The card of a trainer that has not trained, completed with these records."""
    trainer = make_trainer(folder)
    GRPOTrainer.create_model_card(trainer, model_name="tiny")
    complete_model_card(folder, settings={}, log_history=log_history, **kwargs)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("trainer_class", "settings", "methods"),
    [
        (PROMATrainer, {}, ["PROMA"]),
        (PROMATrainer, {"intra_dim": 3}, ["Intra-PROMA", "PROMA"]),
        (PROMATrainer, {"intra_dim": 3, "projection": "none"}, ["Intra-PROMA"]),
        (PROMATrainer, {"divergence": "binary_tv"}, ["PROMA", "DPPO"]),
        (PROMATrainer, {"isopo": "natural", "projection": "none"}, ["ISOPO"]),
        (PROMATrainer, {"projection": "none"}, []),
        (MatchedLengthTrainer, {}, []),
        (RandomDirectionsTrainer, {"loss_type": "dapo", "steps_per_generation": 6}, []),
    ],
)
def test_what_is_known_is_said_of_the_methods_that_act(tmp_path, trainer_class, settings, methods):
    trainer = make_trainer(tmp_path, trainer_class=trainer_class, **settings)
    assert [*trainer._card_evidence] == [EVIDENCE[method] for method in methods]


def summary_of(folder):
    return json.loads((ROOT / "results" / folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("method", "words", "pairs"),
    [
        ("PROMA", "two to three points better than accumulation-based PROMA", {"proma - grpo": "below"}),
        (
            "PROMA",
            "no different from its projection along the directions of random other sequences, from REINFORCE with "
            "parameter updates as short as PROMA's, or from REINFORCE.",
            {"proma - proma_random": "open", "proma - reinforce_matched": "open", "proma - reinforce": "open"},
        ),
        ("Intra-PROMA", "no difference was seen between Intra-PROMA and GRPO", {"proma_intra - grpo": "open"}),
        ("ISOPO", "no different from REINFORCE", {"isopo - reinforce": "open"}),
        ("ISOPO", "GRPO with a tuned epsilon was better", {"isopo - grpo": "below"}),
        ("DPPO", "no different from REINFORCE", {"dppo - reinforce": "open"}),
        ("DPPO", "probably better nearly on-policy", {"dppo - grpo": "below"}),
    ],
)
def test_evidence_is_that_of_the_comparison(method, words, pairs):
    """By 95% t-intervals, in both regimes if the sentence names both."""
    assert words in EVIDENCE[method]
    summary = summary_of("frontier_cpu")
    both = "nearly on-policy and off-policy" in EVIDENCE[method] and "better nearly on-policy" not in words
    for pair, verdict in pairs.items():
        for regime in ("on_policy", "stale") if both else ("on_policy",):
            found = summary[regime]["pairs"].get(pair)
            if found is not None:  # random directions, and ISOPO, nearly on-policy alone
                low, high = found["score_t"]
                assert ("below" if high < 0 else "open" if low < 0 < high else "above") == verdict, (regime, pair)


def test_evidence_of_the_pretrained_model():
    pairs = summary_of("frontier_smollm2")["pretrained"]["pairs"]
    for method, arm in (("PROMA", "proma"), ("Intra-PROMA", "proma_intra")):
        assert "no difference from REINFORCE or GRPO" in EVIDENCE[method]
        for other in ("reinforce", "grpo"):
            low, high = pairs[f"{arm} - {other}"]["score_t"]
            assert low < 0 < high


def test_how_many_more_samples_intra_proma_needs():
    assert "a third more samples to 80% accuracy" in EVIDENCE["Intra-PROMA"]
    for regime in ("on_policy", "stale"):
        arms = summary_of("frontier_cpu")[regime]["arms"]
        ratio = arms["proma_intra"]["completions_to_target"][0] / arms["grpo"]["completions_to_target"][0]
        assert ratio == pytest.approx(4 / 3, abs=0.03)


def test_without_metrics_there_is_no_result(tmp_path):
    card = write_card(tmp_path, [{"step": 1, "loss": 0.1, "reward": None, "entropy": math.nan}])
    assert card.data.eval_results is None and card.data.model_name == "tiny"
    assert "### Results" not in card.text and "figure.png" not in card.text
    assert "a model that is not on the Hugging Face Hub" in card.text and 'model="tiny"' in card.text


def test_a_figure_is_shown(tmp_path):
    (tmp_path / "figure.png").touch()
    assert "](figure.png)" in write_card(tmp_path).text


def test_first_and_last_values(tmp_path):
    log = [{"step": 0, "eval_accuracy": 0.25}, {"step": 4, "reward": 0.5}, {"step": 8, "eval_accuracy": 0.61239}]
    card = write_card(tmp_path, [*log, {"step": 8, "eval_accuracy": math.nan}, {"step": 8, "train_runtime": 1.0}])
    rows = [line for line in card.text.splitlines() if "(step" in line]
    assert rows == [
        "| Accuracy on held-out problems, greedy decoding | 0.25 (step 0) | 0.6124 (step 8) |",
        "| Mean reward in training | 0.5 (step 4) | 0.5 (step 4) |",
    ]
    (result,) = card.data.eval_results
    assert result.metric_value == 0.6124 and result.dataset_name == "unnamed"


@pytest.mark.parametrize(
    ("names", "metric_type", "value", "split"),
    [
        (("reward",), "mean_reward", 3, None),
        (("reward", "eval_reward"), "mean_reward", 6, "test"),
        (("reward", "eval_reward", "eval_accuracy"), "accuracy", 9, "test"),
    ],
)
def test_the_result_is_the_best_evidence_there_is(names, metric_type, value, split):
    metrics = {name: [(0, 1.0), (5, 3.0 * (i + 1))] for i, name in enumerate(names)}
    result = final_result(metrics, CardDataset("me/problems", held_out="test"))
    assert (result.metric_type, result.metric_value, result.dataset_split) == (metric_type, value, split)
    assert result.dataset_type == "me/problems"
    assert final_result(metrics).dataset_type == "unnamed"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", ("mit", None, None)),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", ("other", "own", None)),
        ("license: other\nlicense_link: https://example.org", ("other", None, "https://example.org")),
        ("tags: [a", (None, None, None)),
        (None, (None, None, None)),
    ],
)
def test_the_license_is_the_base_models(tmp_path, metadata, expected):
    base = tmp_path / "base"
    base.mkdir()
    if metadata is not None:
        (base / "README.md").write_text(f"---\n{metadata}\n---\n")
    data = write_card(tmp_path, base_model=str(base)).data
    assert (data.license, data.license_name, data.license_link) == expected


def test_without_the_hub_a_license_stays_unknown(tmp_path):
    assert write_card(tmp_path, base_model="nobody/has-this-model").data.license is None


def test_adapters_and_what_a_user_passes(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LORA)
    trainer.create_model_card(model_name="tiny", dataset_name="me/problems", tags="mine")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.datasets) == ("peft", "me/problems") and "mine" in data.tags
