"""What the README and the documentation show runs as it stands."""

import inspect
import re
from pathlib import Path
from unittest.mock import MagicMock

import datasets
import torch
import trl
from support import oracle
from support.models import tiny_model
from support.sequences import expected, make_batches, objectives

import proma_trl
from proma_trl import PROMAConfig, PROMATrainer

ROOT = Path(__file__).parents[2]


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_plain_loop():
    code = re.search(r"<!-- loop:.*?-->\n```python\n(.*?)```", page("docs/loops.md"), re.DOTALL).group(1)
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
    code = re.search(r"<!-- weights:.*?-->\n```python\n(.*?)```", page("docs/dppo.md"), re.DOTALL).group(1)
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
    pattern = r"^\| `((?:projection|isopo|intra|divergence|ratio|adapter|order|max_tokens)\w*)` \| `(.*?)` \|"
    table = page("docs/settings.md").partition("## Which to choose")[0]
    documented = dict(re.findall(pattern, table, re.MULTILINE))
    for name, default in documented.items():
        assert getattr(PROMAConfig, name) == eval(default), name
    own = PROMAConfig.__annotations__.keys() - {"_method", "gradient_accumulation_steps"}
    assert documented.keys() == own


def test_the_readmes_five_lines(monkeypatch):
    """With recorders in the place of what they call."""
    trainer, load, names = MagicMock(), MagicMock(), {}
    monkeypatch.setattr(proma_trl, "PROMATrainer", trainer)
    monkeypatch.setattr(datasets, "load_dataset", load)
    (code,) = re.findall(r"```python\n(.*?)```", page("README.md"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code, names)
    bound = inspect.signature(PROMATrainer).bind(*trainer.call_args.args, **trainer.call_args.kwargs).arguments
    assert bound["reward_funcs"] is trl.rewards.accuracy_reward
    assert bound["train_dataset"] is load.return_value
    trainer.return_value.train.assert_called_once_with()
