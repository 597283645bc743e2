"""The setting of activation checkpointing, which newer versions of transformers call by another name."""

import warnings

import pytest
from transformers import TrainingArguments

from proma_trl import DPPOConfig, PROMAConfig
from proma_trl.trainer.trl_internals import CHECKPOINTING


def test_the_name_is_the_newest():
    newer = hasattr(TrainingArguments, "activation_checkpointing")
    assert CHECKPOINTING == ("activation_checkpointing" if newer else "gradient_checkpointing")


@pytest.mark.parametrize("config", [PROMAConfig, DPPOConfig])
@pytest.mark.parametrize(
    ("settings", "enabled"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": True}, True),
        ({CHECKPOINTING: False}, False),
        ({CHECKPOINTING: True}, True),
    ],
)
def test_both_names_are_taken_and_nothing_is_announced(tmp_path, config, settings, enabled):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = config(str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert args.gradient_checkpointing is getattr(args, CHECKPOINTING) is enabled
