"""`python -m proma_trl.check`: says beforehand what the accumulation then does."""

import subprocess
import sys

import pytest
from support.models import tiny_llava, tiny_mixture, tiny_model
from support.vision import OTHERS, tiny_vlm
from transformers import T5Config

from proma_trl import ProjectedAccumulation
from proma_trl.check import NONE, RERUN, RULE, check, main, make_model


def ways(report):
    return {way.how: way.kinds for way in report.ways}


def test_a_model_whose_layers_all_have_rules():
    report = check(tiny_model("qwen3-tied"))
    assert ways(report) == {RULE: {"Embedding": 1, "Qwen3RMSNorm": 9, "Linear": 15}}
    assert report.trains and report.largest_rerun is None and report.rerun_share == 0
    assert report.trained == sum(p.numel() for p in tiny_model("qwen3-tied").parameters())


def test_a_mixture():
    model = tiny_mixture("gpt_oss")
    report = check(model)
    assert ways(report)[RERUN] == {"GptOssAttention": 1} and report.trains
    assert ways(report)[RULE]["GptOssExperts"] == ways(report)[RULE]["GptOssTopKRouter"] == 1
    accumulation = ProjectedAccumulation(model, microbatch_size=8)
    assert sum(ways(report)[RERUN].values()) == len(accumulation.rerun_names())
    # Of four experts, a token meets two
    layer, total = model.model.layers[0], sum(p.numel() for p in model.parameters())
    sinks, attention = 4, sum(p.numel() for p in layer.self_attn.parameters())
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    assert report.largest_rerun == ("model.layers.0.self_attn.sinks", sinks)
    assert report.rerun_share == pytest.approx(attention / (total - experts / 2))
    assert f"memory for 8 gradients of one tensor at a time: {8 * sinks * 4 / 2**30:.2f} GiB" in str(report)


def refused():
    return tiny_vlm("glm4v", OTHERS["glm4v"])


def test_a_model_that_does_not_train():
    report = check(refused(), microbatch_size=2)
    assert not report.trains and "Conv3d" in ways(report)[NONE]
    assert "outside the text decoder" in str(report) and "It does not train with 2 sequences" in str(report)
    with pytest.raises(ValueError, match="PROMA needs the gradient of each sequence"):
        ProjectedAccumulation(refused(), microbatch_size=2)
    alone = check(refused(), microbatch_size=1)
    assert alone.trains and "It trains with one sequence a microbatch" in str(alone)


def test_parts_add_up():
    for model in (tiny_model("gpt2"), tiny_mixture("gpt_oss"), tiny_llava()):
        report = check(model)
        assert sum(way.parameters for way in report.ways) == report.trained
        assert 0 < report.intra <= report.trained


def test_the_command(tmp_path):
    tiny_mixture("gpt_oss").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # weights are not read
    command = [sys.executable, "-m", "proma_trl.check", str(tmp_path), "--microbatch_size", "4"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "(GptOssForCausalLM)" in run.stdout and "by running again" in run.stdout
    assert "by running again, 0.0% of these parameters: 1 GptOssAttention" in run.stdout
    assert "It trains with 4 sequences a microbatch." in run.stdout


def test_exit_status_and_adapters(tmp_path, capsys):
    refused().save_pretrained(tmp_path)
    assert make_model(str(tmp_path)).device.type == "meta"
    assert main([str(tmp_path)]) == 1
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapters = ["--use_peft", "--lora_target_modules", targets, "--lora_task_type", "CAUSAL_LM"]
    assert main([str(tmp_path), *adapters]) == 0
    assert "8 Linear" in capsys.readouterr().out


def test_nothing_to_train():
    model = tiny_model("qwen3-tied").requires_grad_(False)
    for size in (1, 8):
        report = check(model, microbatch_size=size)
        assert not report.trains and str(report).startswith("There is nothing to train")


def test_an_encoder_decoder_model(tmp_path, capsys):
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        architectures=["T5ForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    assert main([str(tmp_path), "--microbatch_size", "1"]) == 1
    assert "`T5ForConditionalGeneration` is an encoder-decoder model." in capsys.readouterr().out
