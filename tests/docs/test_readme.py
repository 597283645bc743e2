"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch
from support import oracle
from support.models import tiny_model
from support.sequences import expected, make_batches, objectives

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_plain_loop():
    code = re.search(r"<!-- loop:.*?-->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 12
    model, batches = tiny_model("qwen3-tied"), make_batches("qwen3-tied", 8)
    gradients = {}

    class Optimizer(torch.optim.SGD):
        def step(self):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    names = {
        "model": model,
        "microbatches": [(batch[:3], batch[3]) for batch in batches],
        "sequence_log_probs": lambda model, microbatch: -objectives(model, *microbatch),
        "optimizer": Optimizer(model.parameters(), lr=0.0),
    }
    exec(code, names)
    oracle.assert_close(gradients, expected(model, batches))
    assert all(p.grad is None for p in model.parameters())


def test_weights_of_a_trust_region():
    text = (Path(__file__).parents[2] / "docs" / "dppo.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- weights:.*?-->\n```python\n(.*?)```", text, re.DOTALL).group(1)
    log_probs = torch.tensor([[-0.1, -2.0], [-0.5, -3.0]], requires_grad=True)
    names = {
        "advantages": torch.tensor([1.0, -1.0]),
        "log_probs": log_probs,
        "sampler_log_probs": torch.tensor([[-1.0, -2.1], [-0.4, -1.0]]),
    }
    exec(code, names)
    names["loss"].backward()
    # The first token went up, and the last one down, by more than 0.15
    want = -torch.tensor([[0.0, 0.1], [-0.1, 0.0]]).exp() * torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) / 4
    torch.testing.assert_close(log_probs.grad, want)


def test_settings_and_their_defaults():
    from proma_trl import PROMAConfig

    for name, default in re.findall(
        r"^\| `((?:projection|isopo|intra|divergence|ratio|adapter)\w*)` \| `(.*?)` \|", README, re.MULTILINE
    ):
        assert getattr(PROMAConfig, name) == eval(default), name
