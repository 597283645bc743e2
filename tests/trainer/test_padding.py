"""No forward pass runs on columns that are padding in all of its sequences, and nothing changes by that."""

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from support import dppo
from support.architectures import VOCABULARY, NotBuildable, class_names, tiny_causal_lm
from support.harness import LORA, make_inputs, make_model, make_trainer, trainer_gradients
from torch.nn.functional import pad

from proma_trl import DPPOConfig, DPPOTrainer
from proma_trl.tools.policy_metrics import PolicyMetrics
from proma_trl.trainer.padding import Columns, PaddingTrimmer, real_columns

ARCHITECTURES = ["qwen3-tied", "gpt2", "opt", "gemma2-softcap", "qwen3-moe", "lfm2", "falcon-h1", "gpt-oss"]


def test_real_columns():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]])
    assert real_columns(mask, 4) == Columns(1, 6, 2)
    assert real_columns(mask, 4, multiple=2) == Columns(0, 6, 2)
    assert real_columns(mask, 4, multiple=8) == Columns(0, 8, 4)
    assert real_columns(mask, 4, spare=1) == Columns(1, 7, 3)
    assert real_columns(mask, 4, spare=9) == Columns(1, 8, 4)
    mask[:, 4:] = 0
    assert real_columns(mask, 4) == Columns(1, 5, 1)
    assert real_columns(torch.zeros(2, 8), 4) == Columns(3, 5, 1)
    assert real_columns(torch.ones(2, 8), 4) == Columns(0, 8, 4)


def widened(inputs, left=3, right=5):
    """The same microbatch among longer ones: with more columns of padding."""
    wide = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            wide[name] = pad(value, (left, 0) if name.startswith("prompt") else (0, right))
        elif isinstance(value, torch.Tensor) and value.dim() == 3:  # the sampler's most probable tokens
            wide[name] = pad(value, (0, 0, 0, right), value=-torch.inf if value.is_floating_point() else -1)
    return wide


def all_columns(self, mask, num_scored, has_images=False):
    return Columns(0, mask.shape[1], num_scored)


def assert_as_with_padding(make, microbatches, monkeypatch):
    """Gradients and losses, with columns of padding and without them."""
    shapes = []

    def run():
        trainer = make()
        shapes.clear()
        embeddings = trainer.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        gradients, losses = trainer_gradients(trainer, [widened(inputs) for inputs in microbatches])
        assert trainer._checked
        return gradients, losses, max(length for _, length in shapes)

    found, losses, longest = run()
    with monkeypatch.context() as context:
        context.setattr(PaddingTrimmer, "columns", all_columns)
        want, others, padded = run()
    assert (longest <= 12, padded) == (True, 19)
    assert losses == pytest.approx(others, rel=1e-6)
    largest = max(gradient.norm() for gradient in want.values())
    for name, gradient in want.items():
        tolerance = 1e-6 if gradient.dtype == torch.float64 else 1e-5
        assert (found[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3 * largest), name


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_without_padding(architecture, k, tmp_path, monkeypatch):
    # The attention of Gemma 2 is NaN in float64
    dtype = torch.float32 if architecture.startswith("gemma2") else torch.float64

    def make():
        model = make_model(architecture, dtype=dtype)
        return make_trainer(tmp_path, model, per_device_train_batch_size=k, generation_batch_size=8)

    assert_as_with_padding(make, [make_inputs(k, seed, off_policy=True) for seed in range(3)], monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "exact"},
        {"projection": "none"},
        {"isopo": "natural", "projection": "none"},
        {"intra_dim": 2, "projection": "none"},
        {"intra_dim": 2},
        {"loss_type": "bnpo"},
        {"peft_config": LORA},
        {"divergence": "topk_tv", "divergence_top_k": 4, "divergence_threshold": 0.1},
        {"pad_to_multiple_of": 2},
    ],
    ids=str,
)
def test_methods_without_padding(settings, tmp_path, monkeypatch):
    microbatches = [make_inputs(4, seed) for seed in range(3)]
    if "divergence" in settings:
        microbatches = dppo.stale_inputs("qwen3-tied", 4, settings["divergence_top_k"])

    def make():
        return make_trainer(tmp_path, make_model(dtype=torch.float64), **settings)

    assert_as_with_padding(make, microbatches, monkeypatch)


@pytest.mark.parametrize("mask", ["one", "all", "tool"])
def test_completions_that_do_not_count(mask, tmp_path, monkeypatch):
    microbatches = [make_inputs(4, seed) for seed in range(3)]
    if mask == "tool":
        for inputs in microbatches:
            inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
            inputs["tool_mask"][:, 2:4] = 0
    else:
        microbatches[1]["completion_mask"][slice(None) if mask == "all" else 2] = 0
    assert_as_with_padding(lambda: make_trainer(tmp_path, make_model(dtype=torch.float64)), microbatches, monkeypatch)


@pytest.mark.parametrize(
    "architecture, needs_positions, is_invariant",
    [("qwen3-tied", True, True), ("gpt2", True, False), ("opt", False, True), ("falcon-h1", None, True)],
)
def test_what_a_model_makes_of_padding_on_the_left(architecture, needs_positions, is_invariant, tmp_path):
    trainer = make_trainer(tmp_path, make_model(architecture))
    trainer_gradients(trainer, [make_inputs(4, 0)])
    assert trainer._padding._is_invariant == is_invariant
    assert needs_positions is None or trainer._padding._needs_positions == needs_positions


def test_virtual_tokens_are_told_no_positions(tmp_path, recwarn):
    """The distance between them and the tokens would change without the columns between."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(tmp_path, per_device_train_batch_size=1, generation_batch_size=8, peft_config=config)
    trainer_gradients(trainer, [widened(make_inputs(1, seed)) for seed in range(3)])
    assert not trainer._padding._is_invariant and not trainer._padding._needs_positions
    assert not [warning for warning in recwarn if "Position ids" in str(warning.message)]


def test_a_model_that_does_not_ignore_padding_keeps_that_on_the_left(tmp_path):
    trainer = make_trainer(tmp_path)
    trimmer = PaddingTrimmer(trainer.model)

    def sums(ids, mask, **kwargs):  # a recurrence without a mask
        return ids.double().cumsum(1)[:, 1:]

    trimmer.compare(sums, [7, 8, 9, 10], torch.float64, torch.device("cpu"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    assert trimmer.columns(mask, 3) == Columns(0, 5, 2)


def test_no_forward_pass_runs_on_a_column_of_padding(tmp_path):
    """Training, old log-probabilities, evaluation, divergences, and what is measured beside them."""
    seen = []
    model = make_model()
    trainer = make_trainer(
        tmp_path,
        model,
        steps_per_generation=6,
        gradient_accumulation_steps=3,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        eval_dataset=Dataset.from_dict({"prompt": ["ab", "what is 2?"] * 2}),
    )
    trainer.add_callback(PolicyMetrics(trainer))
    trainer._probe_padding(trainer.model)
    original = model.model.forward

    def forward(*args, **kwargs):
        if kwargs.get("past_key_values") is None and not kwargs.get("use_cache"):
            seen.append(kwargs["attention_mask"])
        return original(*args, **kwargs)

    model.model.forward = forward
    trainer.train()
    # But for the passes with which `PolicyMetrics` finds out how the model takes padding
    seen = [mask for mask in seen if mask.tolist() != [[0, 0, 0] + [1] * 8]]
    assert len(seen) > 20
    for mask in seen:
        assert mask[:, 0].any() and (mask[:, -1].any() or mask.shape[1] <= 2)


def test_dppo_reads_its_divergences_on_the_trimmed_columns(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_class=DPPOTrainer, config_class=DPPOConfig, divergence="topk_kl", divergence_top_k=3
    )
    trainer.train()
    record = trainer.state.log_history[0]
    # On-policy, but for rounding
    assert record["dppo/divergence/max"] < 1e-4 and record["dppo/missing_fraction"] == 0


@pytest.mark.slow
def test_every_class_gives_the_same_log_probabilities():
    """Transformers' causal language models on sequences of several lengths, with and without columns of padding."""
    tried = []
    for name in class_names():
        if name == "CpmAntForCausalLM":  # does not read the attention mask
            continue
        try:
            model = tiny_causal_lm(name).eval()
        except NotBuildable:
            continue

        def log_probs(ids, mask, model=model, **kwargs):
            logits = model(input_ids=ids, attention_mask=mask, **kwargs).logits
            return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(6, VOCABULARY, (3, 20), generator=generator)
        mask = torch.ones_like(ids)
        for i, (left, right) in enumerate([(5, 6), (7, 4), (8, 5)]):
            mask[i, :left], mask[i, 20 - right :] = 0, 0
        ids = ids * mask
        trimmer = PaddingTrimmer(model)
        try:
            with torch.no_grad():
                trimmer.compare(log_probs, [7, 12, 9, 20, 11, 8, 30, 10], torch.float64, torch.device("cpu"))
                columns = trimmer.columns(mask, 8)
                kept = slice(columns.start, columns.stop)
                positions = trimmer.positions(columns, ids)
                want, found = log_probs(ids, mask), log_probs(ids[:, kept], mask[:, kept], **positions)
        except (AttributeError, IndexError, RuntimeError, ValueError):  # does not run on padded text alone
            continue
        real = (mask[:, 1:] * mask[:, :-1]).bool()
        if not want[real].isfinite().all():  # with padding, in float64
            continue
        found = pad(found, (columns.start, 20 - columns.stop))
        # Rotations are computed in float32
        assert (found - want)[real].norm() <= 2e-6 * want[real].norm(), name
        assert columns.stop == 16, name
        tried.append((name, columns.start))
    starts = dict(tried)
    assert len(starts) > 140 and sum(start == 5 for start in starts.values()) > 120
    assert starts["GPT2LMHeadModel"] == starts["MambaForCausalLM"] == 5 and starts["RwkvForCausalLM"] == 0
