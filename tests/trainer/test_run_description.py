"""The line at the beginning of a training."""

import itertools
import logging
import re

import pytest
from datasets import Dataset
from peft import LoraConfig
from support.harness import TOKENIZER, make_args, make_model, make_trainer, vowel_reward
from trl import GRPOConfig, GRPOTrainer

from proma_trl import DPPOConfig, DPPOTrainer, PROMAConfig
from proma_trl.controls import MatchedLengthTrainer, RandomDirectionsTrainer
from proma_trl.trainer.run_description import SayWhatRuns, describe_run

BATCH = "12 sequences a step = 3 microbatches x 4 = 3 prompts x 4 completions"


def parameters(trainer):
    return f"{sum(p.numel() for p in trainer.model.parameters() if p.requires_grad):,} trainable parameters"


@pytest.mark.parametrize(
    "settings,method",
    [
        ({}, "PROMA (iterative, 2 sweeps, bound 0.5)"),
        (
            {"projection": "exact", "projection_bound": None, "projection_strength": 0.5},
            "PROMA (exact, no bound, strength 0.5)",
        ),
        ({"projection_sweeps": 1}, "PROMA (iterative, 1 sweep, bound 0.5)"),
        ({"projection": "none"}, "REINFORCE"),
        ({"gradient_accumulation_steps": 1, "generation_batch_size": 12}, "REINFORCE"),
        (
            {"projection": "none", "isopo": "norm", "isopo_regularization": 2.0},
            "ISOPO (norm, regularization 2)",
        ),
        (
            {"intra_dim": 3, "intra_target": "accumulated", "intra_head": False, "intra_strength": 0.5},
            "Intra-PROMA (dimension 3, 1 power iteration, strength 0.5, target accumulated, without head) and "
            "PROMA (iterative, 2 sweeps, bound 0.5)",
        ),
        (
            {
                "projection": "none",
                "divergence": "topk_kl",
                "divergence_threshold_high": 0.2,
                "divergence_mask": "symmetric",
                "ratio_cap": 5.0,
            },
            "DPPO (topk_kl, top 20, threshold 0.05, threshold high 0.2, mask symmetric, ratio cap 5)",
        ),
    ],
)
def test_the_method_and_its_settings(settings, method, tmp_path):
    assert make_args(tmp_path, **settings).method_summary() == method


def test_without_settings_the_summary_is_the_name(tmp_path):
    choices = {
        "projection": ["iterative", "exact", "none"],
        "isopo": ["none", "natural"],
        "intra_dim": [0, 3],
        "intra_target": ["microbatch", "accumulated"],
        "divergence": [None, "binary_tv", "topk_kl"],
        "gradient_accumulation_steps": [1, 4],
    }
    args = make_args(tmp_path)
    names = set()
    for values in itertools.product(*choices.values()):
        for name, value in zip(choices, values, strict=True):
            setattr(args, name, value)
        assert re.sub(r" \([^)]*\)", "", args.method_summary()) == args.method_name()
        names.add(args.method_name())
    assert len(names) == 16


def test_a_run(tmp_path):
    trainer = make_trainer(tmp_path)
    want = f"PROMA (iterative, 2 sweeps, bound 0.5): {BATCH}; {parameters(trainer)}; cpu, float32."
    assert describe_run(trainer) == want


def test_a_run_of_trls_trainer(tmp_path):
    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=vowel_reward,
        args=make_args(tmp_path, GRPOConfig, gradient_accumulation_steps=1, epsilon_high=0.25, beta=0.01, bf16=True),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 4}),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    assert describe_run(trainer) == (
        "GRPO (clipping 0.2 to 0.25, beta 0.01): 4 sequences a step = 1 microbatch x 4 = 1 prompt x 4 completions; "
        f"{parameters(trainer)}; cpu, float32, bfloat16 autocast."
    )


def test_generations_of_several_steps(tmp_path):
    trainer = make_trainer(
        tmp_path,
        None,
        DPPOTrainer,
        DPPOConfig,
        gradient_accumulation_steps=2,
        steps_per_generation=6,
        num_iterations=2,
    )
    assert (
        "8 sequences a step = 2 microbatches x 4; 24 sequences a generation = 6 prompts x 4 completions, each used "
        "2 times;"
    ) in describe_run(trainer)


@pytest.mark.parametrize(
    "trainer_class,name",
    [
        (MatchedLengthTrainer, "REINFORCE with the step length of PROMA (iterative, 2 sweeps, bound 0.5)"),
        (RandomDirectionsTrainer, "PROMA (iterative, 2 sweeps, bound 0.5) with random directions"),
    ],
)
def test_controls(trainer_class, name, tmp_path):
    assert describe_run(make_trainer(tmp_path, trainer_class=trainer_class)).startswith(f"{name}: {BATCH};")


def test_several_ranks(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.accelerator.state.num_processes, trainer.args.generation_batch_size = 2, 24
    try:
        assert "24 sequences a step = 3 microbatches x 4 x 2 ranks = 6 prompts x 4 completions" in describe_run(
            trainer
        )
    finally:
        trainer.accelerator.state.num_processes = 1


def test_training_begins_with_the_line_once(tmp_path, caplog, capsys):
    trainer = make_trainer(tmp_path)
    trainer.train()
    out = capsys.readouterr().out
    assert out.count(describe_run(trainer)) == 1
    assert out.index(describe_run(trainer)) < out.index("train_runtime")
    assert describe_run(trainer) not in caplog.messages


@pytest.mark.parametrize("level,logged", [(logging.INFO, 1), (logging.ERROR, 0)])
def test_the_log_shows_or_silences_it(level, logged, tmp_path, caplog, capsys):
    trainer = make_trainer(tmp_path)
    with caplog.at_level(level, logger="proma_trl"):
        SayWhatRuns(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
    assert caplog.messages.count(describe_run(trainer)) == logged
    assert describe_run(trainer) not in capsys.readouterr().out


def test_other_ranks_are_silent(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    trainer.state.is_world_process_zero = False
    SayWhatRuns(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
    assert describe_run(trainer) not in capsys.readouterr().out


def test_all_settings_of_a_method_are_known_to_the_summary(tmp_path):
    """A setting that is added and changes the method must be shown where it isn't at its default."""
    changed = {
        "projection": "exact",
        "projection_sweeps": 3,
        "projection_bound": 0.25,
        "projection_strength": 0.5,
        "projection_scope": "global",
        "isopo": "norm",
        "isopo_regularization": 2.0,
        "intra_dim": 3,
        "intra_power_iterations": 2,
        "intra_strength": 0.5,
        "intra_target": "accumulated",
        "intra_head": False,
        "divergence": "topk_tv",
        "divergence_threshold": 0.1,
        "divergence_threshold_high": 0.3,
        "divergence_top_k": 5,
        "divergence_mask": "symmetric",
        "ratio_cap": 5.0,
    }
    own = {name for name in PROMAConfig.__annotations__ if not name.startswith("_")}
    # How it is computed
    computing = {"projection_memory_budget", "projection_accumulator_dtype", "adapter_dtype"}
    computing |= {"order_by_length", "max_tokens_per_microbatch"}
    assert own - computing - {"gradient_accumulation_steps"} == changed.keys()
    on = {"isopo": "natural", "intra_dim": 10, "divergence": "topk_kl"}
    args = make_args(tmp_path, **on)
    base = args.method_summary()
    for name, value in changed.items():
        kept = getattr(args, name)
        setattr(args, name, value)
        assert args.method_summary() != base, name
        setattr(args, name, kept)


def test_the_choice_of_float32_is_said(tmp_path):
    trainer = make_trainer(tmp_path, bf16=None)
    assert describe_run(trainer).endswith("cpu, float32 (the CPU's default; `bf16=True` is for bfloat16).")
