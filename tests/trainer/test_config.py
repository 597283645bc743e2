"""What PROMAConfig refuses, and how it says so."""

import math
import re

import pytest
import torch
from support.harness import make_args
from transformers import HfArgumentParser
from trl import GRPOConfig

from proma_trl import PROMAConfig
from proma_trl.trainer.grpo_fields import LOSS_TYPES


def test_defaults_are_the_papers():
    args = PROMAConfig("unused", use_cpu=True, bf16=False)
    assert (args.projection, args.projection_sweeps, args.projection_bound) == ("iterative", 2, 0.5)
    assert args.projection_strength == 1.0
    assert isinstance(args, GRPOConfig)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo", "luspo", "nonsense"])
def test_other_losses_are_refused(loss_type, tmp_path):
    with pytest.raises(ValueError, match=rf"`loss_type='{loss_type}'`.*REINFORCE.*'dr_grpo'"):
        make_args(tmp_path, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_that_are_sums_over_sequences_are_kept(loss_type, tmp_path):
    assert make_args(tmp_path, loss_type=loss_type).loss_type == loss_type


def test_the_load_balancing_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef=0.01`.*Set `router_aux_loss_coef=0.0`"):
        make_args(tmp_path, router_aux_loss_coef=0.01)
    assert make_args(tmp_path, router_aux_loss_coef=0.0).router_aux_loss_coef == 0.0


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=rf"`optim='{optim}'`.*within the backward pass.*adamw_torch"):
        make_args(tmp_path, optim=optim)


REFUSED = {
    "projection": ["qr", None, ["iterative"], 1],
    "projection_sweeps": [0, 1.5, "2", None, True, [2]],
    "projection_bound": [-1.0, "0.5", [0.5], True, math.nan, -math.inf],
    "projection_strength": [2.0, -0.1, None, "1", True, math.nan],
    "projection_memory_budget": [0.0, -1, "1", True, math.inf, math.nan],
    "projection_scope": ["node", None, 1],
    "projection_accumulator_dtype": ["float16", None, torch.float32],
    "adapter_dtype": ["float16", None, torch.float32],
    "gradient_accumulation_steps": [0, -1, "4", None, 2.5, True],
    "order_by_length": [1, "true", 0.0],
    "max_tokens_per_microbatch": [0, -1, "4", 2.5, True],
    "per_device_train_batch_size": [0, -1, "4", None, 2.5],
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_of_the_wrong_kind_or_out_of_range_are_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be ")):
        make_args(tmp_path, **{name: value})


def test_all_that_is_refused_is_named_at_once(tmp_path):
    wrong = {"beta": 0.04, "epsilon": 0.1, "loss_type": "sapo", "projection_bound": -2, "projection": "qr"}
    wrong |= {"intra_dim": -1, "gradient_accumulation_steps": 0, "ratio_cap": 5.0}
    with pytest.raises(ValueError) as raised:
        make_args(tmp_path, **wrong)
    lines = str(raised.value).splitlines()
    assert len(lines) >= len(wrong)
    assert all(any(f"`{name}" in line for line in lines) for name in wrong)
    assert len(set(lines)) == len(lines)


def test_whole_numbers_stand_for_real_ones(tmp_path):
    args = make_args(tmp_path, projection_bound=1, projection_strength=1, projection_memory_budget=2)
    for name in ("projection_bound", "projection_strength", "projection_memory_budget"):
        assert isinstance(getattr(args, name), float)


def test_the_default_accumulates_several_microbatches():
    args = PROMAConfig("unused", use_cpu=True, bf16=False)
    assert args.gradient_accumulation_steps == 16 and args.steps_per_generation == 16


def test_the_command_line_can_lift_the_bound(tmp_path):
    parser = HfArgumentParser(PROMAConfig)
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (args,) = parser.parse_args_into_dataclasses([*flags, "--projection_bound", "inf", "--projection", "exact"])
    assert args.projection_bound is None and args.projection_settings().method == "exact"
