"""PROMATrainer on completions of a real vLLM server, over HTTP."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests
import torch
from test_colocate import make_trainer
from transformers import AutoConfig, AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(policy, log):
    """Starts a server and waits until it answers. Returns the process and its address."""
    port = free_port()
    # What `vllm serve` runs; the command itself looks for a package named "vllm", which the CPU build's is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy)]
    command += [
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--max-model-len",
        "64",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += ["--logprobs-mode", "processed_logprobs", "--max-num-seqs", "16"]
    process = subprocess.Popen(
        command, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=log, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(180):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {open(log.name).read()[-3000:]}")
        try:
            if requests.get(f"{url}/health", timeout=2).status_code == 200:
                return process, url
        except requests.exceptions.RequestException:
            time.sleep(1)
    raise RuntimeError("the server did not come up")


def stop(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    with open(tmp_path_factory.mktemp("server") / "log", "w") as log:
        process, url = serve(policy, log)
        yield url
        stop(process)


@pytest.fixture(autouse=True)
def without_nccl(monkeypatch, request):
    """Weights travel over NCCL, which needs GPUs: here the server keeps those that it started with."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
        monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, params: list(params))


def server_trainer(policy, output_dir, url, **kwargs):
    return make_trainer(policy, output_dir, vllm_mode="server", vllm_server_base_url=url, **kwargs)


def test_training_over_http(policy, server, tmp_path):
    trainer = server_trainer(policy, tmp_path, server, max_steps=3)
    trainer.train()
    records = [record for record in trainer.state.log_history if "reward" in record]
    assert len(records) == 3
    assert records[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)
    # The policy moves away from the server's, which the correction sees
    differences = [record["sampling/sampling_logp_difference/mean"] for record in records]
    assert differences[0] < 0.05 < differences[-1]


def test_a_trust_region_over_http(policy, server, tmp_path):
    """The server gives twenty tokens at a position, and the policy leaves the one that it serves."""
    region = {"divergence": "topk_kl", "divergence_threshold": 0.02}
    trainer = server_trainer(policy, tmp_path, server, max_steps=3, learning_rate=1e-2, **region)
    trainer.train()
    records = [record for record in trainer.state.log_history if "reward" in record]
    assert len(records) == 3 and all(record["dppo/missing_fraction"] == 0 for record in records)
    assert records[0]["dppo/divergence/max"] < 0.01 and records[0]["dppo/ratio/max"] == pytest.approx(1, abs=0.05)
    # Weights don't reach the server here, so that its rollouts are stale
    assert records[-1]["dppo/divergence/mean"] > 10 * records[0]["dppo/divergence/mean"]
    assert records[-1]["dppo/masked_fraction"] > 0


def test_a_server_that_is_not_up(policy, tmp_path):
    with pytest.raises(
        requests.exceptions.ConnectionError,
        match=r"vLLM server can't be reached at http://127.0.0.1:\d+ after 1.*serve",
    ):
        server_trainer(policy, tmp_path, f"http://127.0.0.1:{free_port()}", vllm_server_timeout=1)


def test_a_server_that_serves_another_model(policy, server, tmp_path):
    config = AutoConfig.from_pretrained(policy)
    config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"serves another model.*`intermediate_size` is 128 there and 96 here"):
        server_trainer(tmp_path / "other", tmp_path, server)


def test_a_server_that_dies_ends_training_after_saving(policy, tmp_path):
    with open(tmp_path / "log", "w") as log:
        process, url = serve(policy, log)
        try:
            trainer = server_trainer(policy, tmp_path / "run", url, max_steps=4)
            original = trainer.vllm_generation.generate

            def generate(*args, **kwargs):
                if trainer.state.global_step == 2:
                    stop(process)
                return original(*args, **kwargs)

            trainer.vllm_generation.generate = generate
            trainer.vllm_generation.vllm_client.session.mount("http://", requests.adapters.HTTPAdapter())
            with pytest.raises(RuntimeError, match=r"(?s)vLLM server at .* failed at step 2: .*run/checkpoint-2"):
                trainer.train()
        finally:
            stop(process)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for (name, a), b in zip(saved.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    with open(tmp_path / "log", "a") as log:
        process, url = serve(policy, log)
        try:
            resumed = server_trainer(policy, tmp_path / "resumed", url, max_steps=3)
            resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        finally:
            stop(process)
    assert resumed.state.global_step == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: weights travel over NCCL")
def test_weights_reach_the_server(policy, tmp_path):
    from test_colocate import fresh_differences

    with open(tmp_path / "log", "w") as log:
        process, url = serve(policy, log)
        try:
            reference = AutoModelForCausalLM.from_pretrained(policy)
            trainer = server_trainer(policy, tmp_path / "run", url, max_steps=3, use_cpu=False, learning_rate=1e-2)
            trainer.train()
            own, other = fresh_differences(trainer, reference.to(trainer.model.device))
        finally:
            stop(process)
    assert max(own) < 0.05 and other > 0.2
