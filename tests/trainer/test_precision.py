"""What a training computes in where its settings leave that open."""

import pytest
import torch
from support.harness import make_trainer
from trl import GRPOConfig, TrlParser

from proma_trl import DPPOConfig, PROMAConfig
from proma_trl.trainer import precision
from proma_trl.trainer.precision import choose_precision, precision_reason

CONFIGS = pytest.mark.parametrize("config", [PROMAConfig, DPPOConfig])


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for the choice alone."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


@CONFIGS
@pytest.mark.parametrize("settings", [{}, {"use_cpu": True}, {"use_cpu": False}])
def test_without_an_accelerator_training_is_float32_on_the_cpu(config, settings, tmp_path, cpu_only):
    args = config(str(tmp_path), report_to=[], **settings)
    assert (args.use_cpu, args.bf16, args.mixed_precision, args.device) == (True, False, "no", torch.device("cpu"))
    assert precision_reason(args) is not None


def test_so_it_is_where_a_cpu_is_asked_for(tmp_path, gpu):
    args = PROMAConfig(str(tmp_path), report_to=[], use_cpu=True)
    assert (args.use_cpu, args.bf16) == (True, False)
    assert "CPU's default" in precision_reason(args)


def test_and_where_accelerate_is_asked_for_it(tmp_path, gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = PROMAConfig(str(tmp_path), report_to=[])
    assert (args.use_cpu, args.bf16) == (True, False)


@CONFIGS
@pytest.mark.parametrize("value", [True, False])
def test_what_is_set_stays(config, value, tmp_path, cpu_only):
    args = config(str(tmp_path), report_to=[], use_cpu=True, bf16=value)
    assert (args.bf16, args.mixed_precision) == (value, "bf16" if value else "no")
    assert precision_reason(args) is None


def test_what_accelerate_is_asked_for_stays(tmp_path, cpu_only, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = PROMAConfig(str(tmp_path), report_to=[], use_cpu=True)
    assert args.mixed_precision == "bf16"
    assert precision_reason(args) is None


def test_float16_stays(tmp_path, cpu_only):
    args = PROMAConfig(str(tmp_path), report_to=[], use_cpu=True, fp16=True)
    assert (args.fp16, args.bf16) == (True, False)
    assert precision_reason(args) is None


@pytest.mark.parametrize("accelerator", ["gpu", "xla"])
def test_accelerators_keep_trls_default(accelerator, tmp_path, cpu_only, monkeypatch):
    args = PROMAConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    args.use_cpu, args.bf16 = False, None
    if accelerator == "gpu":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    else:
        monkeypatch.setattr(precision, "is_torch_xla_available", lambda: True)
    choose_precision(args)
    assert (args.use_cpu, args.bf16, precision_reason(args)) == (False, None, None)


@CONFIGS
def test_a_command_line_leaves_it_open(config, tmp_path, cpu_only):
    parser = TrlParser([config])
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--report_to", "none"])
    assert (args.use_cpu, args.bf16) == (True, False)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--report_to", "none", "--bf16", "true", "--use_cpu"]
    )
    assert args.bf16 is True


def test_trls_configuration_would_be_refused(tmp_path, cpu_only, monkeypatch):
    """Else there would be nothing to choose."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="use_cpu"):
        GRPOConfig(str(tmp_path), report_to=[])


def test_it_trains(tmp_path, cpu_only):
    args = PROMAConfig(
        str(tmp_path),
        report_to=[],
        max_steps=1,
        gradient_accumulation_steps=2,
        max_completion_length=4,
        save_strategy="no",
    )
    trainer = make_trainer(tmp_path, args=args)
    trainer.train()
    assert {param.dtype for param in trainer.model.parameters()} == {torch.float32}
    assert trainer.accelerator.mixed_precision == "no"
