"""The same on a CUDA device, where TRL's fused head takes another path: Triton kernels, and unmasked tokens only."""

import pytest
import torch
from support import dppo, intra, oracle
from support.harness import batch_objectives, definition, make_inputs, make_model, make_trainer, trainer_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs_on_cuda(k):
    return [{name: value.cuda() for name, value in make_inputs(k, seed).items()} for seed in range(3)]


def wanted(trainer, microbatches, **settings):
    """The definition, on the CPU."""
    trainer.model.cpu()
    microbatches = [{name: value.cpu() for name, value in inputs.items()} for inputs in microbatches]
    model, objectives = definition(trainer, microbatches)
    return oracle.accumulate(model, objectives, **settings)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("budget", [0.5, 1e-5])
@pytest.mark.parametrize("architecture", ["qwen3-tied", "llama-untied", "gpt2", "gemma", "cohere"])
def test_float32(architecture, budget, k, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    trainer = make_trainer(
        tmp_path,
        make_model(architecture),
        use_cpu=False,
        per_device_train_batch_size=k,
        generation_batch_size=8,
        projection_memory_budget=budget,
    )
    microbatches = inputs_on_cuda(k)
    found, _ = trainer_gradients(trainer, microbatches)
    found = {name: grad.cpu() for name, grad in found.items()}
    oracle.assert_close(found, wanted(trainer, microbatches))


@pytest.mark.parametrize("method", ["iterative", "exact"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast(method, checkpointing, tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False, bf16=True, projection=method, gradient_checkpointing=checkpointing)
    microbatches = inputs_on_cuda(4)
    found, _ = trainer_gradients(trainer, microbatches)
    found = {name: grad.cpu() for name, grad in found.items()}
    for name, want in wanted(trainer, microbatches, method=method).items():
        assert found[name].dtype == torch.float32
        assert (found[name].double() - want).norm() <= 0.05 * want.norm(), name


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("budget", [0.5, 1e-5])
def test_intra(budget, projection, tmp_path, monkeypatch):
    """Its random numbers are the same on all devices."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    settings = {"intra_dim": 3, "projection": projection, "projection_memory_budget": budget}
    trainer = make_trainer(tmp_path, use_cpu=False, **settings)
    microbatches = inputs_on_cuda(4)
    found, _ = trainer_gradients(trainer, microbatches)
    found = {name: grad.cpu() for name, grad in found.items()}
    trainer.model.cpu()
    model, _ = definition(trainer, microbatches)
    batches = [batch_objectives(trainer, {n: x.cpu() for n, x in m.items()}, len(microbatches)) for m in microbatches]
    head, seed = "model.embed_tokens.weight", trainer.args.seed
    want = intra.accumulate(model, batches, dim=3, seed=seed, fused_head=head, method=projection)
    oracle.assert_close(found, want)


@pytest.mark.parametrize("projection", ["none", "iterative"])
@pytest.mark.parametrize("kind", ["binary_kl", "topk_tv"])
def test_trust_region(kind, projection, tmp_path, monkeypatch):
    """The most probable tokens stay on the CPU until they are needed."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    settings = {"divergence": kind, "divergence_threshold": 0.05, "projection": projection}
    trainer = make_trainer(tmp_path, use_cpu=False, **settings)
    microbatches = dppo.stale_inputs("qwen3-tied", 4, 20 if kind == "topk_tv" else 0)
    on_cuda = [{name: x if "top" in name else x.cuda() for name, x in inputs.items()} for inputs in microbatches]
    found, _ = trainer_gradients(trainer, on_cuda)
    found = {name: grad.cpu() for name, grad in found.items()}
    trainer.model.cpu()
    model, _ = definition(trainer, microbatches)
    for inputs in microbatches:
        inputs["weights"] = dppo.token_weights(trainer.args, model.double(), inputs)
    assert any((inputs["weights"] == 0).any() for inputs in microbatches)
    oracle.assert_close(found, oracle.accumulate(*definition(trainer, microbatches), method=projection))


@pytest.mark.parametrize("settings", [{}, {"intra_dim": 3}, {"intra_dim": 3, "projection": "none"}])
def test_the_backward_pass_does_not_wait_for_the_device(settings, tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False, **settings)
    microbatches = inputs_on_cuda(4)
    trainer_gradients(trainer, microbatches)  # warm up
    loss = trainer.compute_loss(trainer.model, microbatches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
