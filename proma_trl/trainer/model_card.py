"""The model card of a run: what TRL's says, and beside it how the policy was trained and what came of it."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from peft import PeftModel
from trl import GRPOTrainer

# Greedy accuracy on held-out problems, as `GreedyEvaluation` logs it
ACCURACY = "eval_accuracy"

FIGURE = "figure.png"

# In the card's table of results, in this order
_RESULTS = {
    ACCURACY: "Accuracy on held-out problems, greedy decoding",
    "eval_reward": "Mean reward on held-out problems",
    "reward": "Mean reward in training",
    "entropy": "Entropy, nats per token",
    "kl/local": "KL divergence between successive policies, nats per token",
    "kl/lagged": "KL divergence from an earlier policy, nats per token",
    "kl/global": "KL divergence from the initial policy, nats per token",
}
# What the card's metadata name as the model's result: the first of these that was logged
_RESULT_TYPES = {ACCURACY: "accuracy", "eval_reward": "mean_reward", "reward": "mean_reward"}

# What the comparison in docs/protocol.md says of methods, by their names. docs/results.md has the figures
_COMPARISON = (
    "In proma-trl's comparison on a small task (results/frontier_cpu in its repository; each algorithm at its own "
    "best learning rate, ten paired seeds, AdamW, accuracy at equal KL divergence from the initial policy)"
)
_PRETRAINED = (
    "On SmolLM2-135M-Instruct (results/frontier_smollm2; six paired seeds) no difference from REINFORCE or GRPO was "
    "seen in that accuracy."
)
_NOT_TESTED = "Larger models, long answers and the paper's 64 microbatches a step were not tested."
EVIDENCE = {
    "PROMA": f"{_COMPARISON}, GRPO with a tuned epsilon was two to three points better than accumulation-based PROMA, "
    "nearly on-policy and off-policy. PROMA was no different from its projection along the directions of random other "
    "sequences, from REINFORCE with parameter updates as short as PROMA's, or from REINFORCE. "
    f"{_PRETRAINED} {_NOT_TESTED}",
    "Intra-PROMA": f"{_COMPARISON}, no difference was seen between Intra-PROMA and GRPO with a tuned epsilon, within "
    "about three points, nearly on-policy and off-policy. Intra-PROMA needed a third more samples to 80% accuracy. "
    f"Whether it is better than REINFORCE is open. {_PRETRAINED} {_NOT_TESTED}",
    "ISOPO": f"{_COMPARISON}, ISOPO alone was no different from REINFORCE, though it learned sooner, and GRPO with a "
    "tuned epsilon was better.",
    "DPPO": f"{_COMPARISON}, DPPO was no different from REINFORCE, nearly on-policy and off-policy. GRPO with a tuned "
    "epsilon was probably better nearly on-policy. Under PROMA and Intra-PROMA its trust region made no difference "
    "off-policy.",
}

_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "num_generations",
    "loss_type",
    "scale_rewards",
    "learning_rate",
    "seed",
)


@dataclass(frozen=True)
class CardDataset:
    """
    A dataset on the Hugging Face Hub, as a model card names it.

    Args:
        name (`str`):
            Its identifier, such as `"openai/gsm8k"`.
        config (`str`, *optional*):
            Its configuration.
        held_out (`str`, *optional*):
            The split that the policy was evaluated on, such as `"test"` or `"test[:300]"`.
    """

    name: str
    config: str | None = None
    held_out: str | None = None


class ModelCardMixin:
    """
    Completes the model card of a TRL trainer, whoever asks for it: the user, a checkpoint or a push to the Hub.

    Attributes:
        card_dataset ([`CardDataset`], *optional*):
            What the card says of the data. Without it, the card knows what is passed to `create_model_card` or
            `push_to_hub` as `dataset_name`, if anything.
    """

    card_dataset: CardDataset | None = None
    # Arguments that the card shows beside those that all trainers share, and papers that it cites beside `_paper`
    _card_settings: Sequence[str] = ()
    _card_papers: Sequence[Mapping[str, str]] = ()
    # Sentences on what is known of the method
    _card_evidence: Sequence[str] = ()

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """TRL's model card, completed."""
        dataset = CardDataset(dataset_name) if dataset_name else self.card_dataset
        super().create_model_card(model_name, dataset.name if dataset else None, tags)
        if self.is_world_process_zero():
            complete_model_card(
                Path(self.args.output_dir),
                settings={name: getattr(self.args, name) for name in (*self._card_settings, *_SETTINGS)},
                log_history=self.state.log_history,
                base_model=self.model.config._name_or_path,
                dataset=dataset,
                adapter=isinstance(self.model, PeftModel),
                papers=self._card_papers,
                evidence=self._card_evidence,
            )


def complete_model_card(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    base_model: str = "",
    dataset: CardDataset | None = None,
    adapter: bool = False,
    papers: Sequence[Mapping[str, str]] = (),
    evidence: Sequence[str] = (),
) -> None:
    """
    Completes the card that TRL has written as `README.md`: the settings, first and last metrics, the figure if the
    folder has one, and GRPO's citation; in its metadata the result as `model-index`, the task and the license.

    Args:
        folder (`Path`):
            The folder with the card.
        settings (`Mapping[str, Any]`):
            What to show of the trainer's arguments.
        log_history (`Sequence[Mapping[str, Any]]`):
            The log records of the trainer's state.
        base_model (`str`, *optional*):
            The model that was trained, on the Hub or in a local folder. Its license is the card's, if it names one.
        dataset ([`CardDataset`], *optional*):
            The data, if they are on the Hub.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether the folder holds an adapter alone.
        papers (`Sequence[Mapping[str, str]]`, *optional*):
            Papers to cite that TRL's card does not: `title`, `citation`.
        evidence (`Sequence[str]`, *optional*):
            Sentences on what is known of the method, beside what this run shows.
    """
    card = ModelCard.load(folder / "README.md")
    data = card.data
    data.pop("licence")  # a placeholder of TRL's
    data.library_name = "peft" if adapter else "transformers"
    data.pipeline_tag = "text-generation"
    for name, value in _license(base_model).items():
        data[name] = value
    metrics = _finite(log_history)
    result = final_result(metrics, dataset)
    if result is not None:
        data.eval_results = [result]

    # What TRL writes for a base model in a local folder, and for a model that isn't pushed
    text = card.text.replace("[None](https://huggingface.co/None)", "a model that is not on the Hugging Face Hub")
    text = text.replace('model="None"', f'model="{data.model_name}"')
    rows = [f"| `{name}` | `{value!r}` |" for name, value in settings.items()]
    section = _table("Settings", ("Setting", "Value"), rows)
    if metrics:
        rows = [
            f"| {_RESULTS[name]} | {_value(values[0])} | {_value(values[-1])} |" for name, values in metrics.items()
        ]
        section += _table("Results", ("Metric", "First", "Last"), rows)
        if dataset is not None and dataset.held_out and any(name.startswith("eval_") for name in metrics):
            section += f"Held-out problems: `{dataset.held_out}` of `{dataset.name}`.\n\n"
    if (folder / FIGURE).is_file():
        section += f"![The run's metrics over its optimizer steps]({FIGURE})\n\n"
    if evidence:
        section += "### What is known of the method\n\n" + " ".join(evidence) + "\n\n"
    text = _insert(text, "### Framework versions", section)
    for paper in papers:
        cite = f"Cite {paper['title'].partition(':')[0]} as:\n\n```bibtex\n{paper['citation']}\n```\n\n"
        text = _insert(text, "Cite TRL as:", cite)
    grpo = GRPOTrainer._paper["citation"]
    if grpo not in text:
        cite = f"Cite GRPO, whose group-relative advantages it takes, as:\n\n```bibtex\n{grpo}\n```\n\n"
        text = _insert(text, "Cite TRL as:", cite)
    card.text = text
    card.save(folder / "README.md")


def final_result(
    metrics: Mapping[str, Sequence[tuple[int, float]]], dataset: CardDataset | None = None
) -> EvalResult | None:
    """
    What the policy has reached, for a card's `model-index`: its last accuracy on held-out problems, or else its last
    mean reward there, or else in training.

    Args:
        metrics (`Mapping[str, Sequence[tuple[int, float]]]`):
            Of each metric its steps and values.
        dataset ([`CardDataset`], *optional*):
            The data, if they are on the Hub; others are called unnamed.
    """
    name = next((name for name in _RESULT_TYPES if name in metrics), None)
    if name is None:
        return None
    dataset = dataset or CardDataset("unnamed")
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=dataset.name,
        dataset_name=dataset.name,
        dataset_config=dataset.config,
        dataset_split=dataset.held_out if name.startswith("eval_") else None,
        metric_type=_RESULT_TYPES[name],
        metric_name=_RESULTS[name],
        metric_value=round(metrics[name][-1][1], 4),
    )


def _finite(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Of each metric that the card shows and that was logged, its steps and finite values."""
    metrics = {}
    for name in _RESULTS:
        records = [(record["step"], record[name]) for record in log_history if record.get(name) is not None]
        records = [(step, value) for step, value in records if math.isfinite(value)]
        if records:
            metrics[name] = records
    return metrics


def _value(record: tuple[int, float]) -> str:
    step, value = record
    return f"{value:.4g} (step {step})"


def _table(title: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([f"### {title}\n", *head, *rows]) + "\n\n"


def _insert(text: str, before: str, section: str) -> str:
    head, found, tail = text.partition(before)
    return head + section + found + tail


@functools.cache
def _license(base_model: str) -> dict[str, Any]:
    """What the base model's own card says of its license; nothing if it can't be read."""
    local = Path(base_model) / "README.md"
    if not base_model or (os.path.isdir(base_model) and not local.is_file()):
        return {}
    try:
        data = ModelCard.load(local if local.is_file() else base_model).data
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    names = ["license", "license_name"]
    # A relative link is to a file of that model
    if "://" in (data.license_link or ""):
        names.append("license_link")
    return {name: data[name] for name in names if data[name]}
