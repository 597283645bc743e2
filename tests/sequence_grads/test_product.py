"""Modules that multiply once by a matrix of their own: routers, found by a trial."""

import pytest
import torch
import torch.nn.functional as F
from support import oracle
from support.architectures import tiny_causal_lm
from support.sequences import accumulate, expected, make_batches
from torch import nn

from proma_trl import REINFORCE, ProjectedAccumulation
from proma_trl.sequence_grads import plan_modules
from proma_trl.sequence_grads.product import ProductLayer, multiplies_once

FAMILIES = ["Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "GraniteMoeForCausalLM"]


class Router(nn.Module):
    """A router; its subclasses do something else, too, or otherwise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, hidden):
        logits = F.linear(hidden.reshape(-1, 16).float(), self.weight.type(torch.float32), self.bias)
        return logits, logits.softmax(-1).topk(2)


class Twice(Router):
    def forward(self, hidden):
        return F.linear(hidden, self.weight, self.bias) + F.linear(hidden.tanh(), self.weight, self.bias)


class Normalized(Router):
    def forward(self, hidden):
        return F.linear(hidden, self.weight, self.bias) / self.weight.norm()


class Added(Router):
    def forward(self, hidden):
        return F.linear(hidden, self.weight).sigmoid() + self.bias


class Cast(Router):
    def forward(self, hidden):
        return F.linear(hidden.double(), self.weight.type(torch.float64), self.bias.double())


class Multiplied(Router):
    def forward(self, hidden):
        return hidden @ self.weight.mT + self.bias


def test_what_a_router_is():
    assert multiplies_once(Router()) and multiplies_once(Router().bfloat16().float())
    assert multiplies_once(Router().to("meta"))
    for kind in (Twice, Normalized, Added, Cast, Multiplied):
        assert not multiplies_once(kind()), kind


def test_a_weight_in_half_precision_that_is_cast():
    router = Router()
    router.weight = nn.Parameter(router.weight.detach().bfloat16())
    assert multiplies_once(router)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, dtype):
    model, batches = tiny_causal_lm(name, dtype=dtype), make_batches("gemma2-softcap", 3, count=2)
    routers = [entry for entry in plan_modules(model) if isinstance(entry.layer, ProductLayer)]
    assert routers and all("Router" in type(entry.module).__name__ for entry in routers)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_of_a_routers_parameters_is_frozen(frozen):
    """As PEFT's `bias="all"` leaves the weight."""
    model, batches = (
        tiny_causal_lm("GptOssForCausalLM", dtype=torch.float32),
        make_batches("gemma2-softcap", 3, count=2),
    )
    for name, param in model.named_parameters():
        if name.endswith(f"router.{frozen}"):
            param.requires_grad_(False)
    found, _ = accumulate(model, batches)
    oracle.assert_close(found, expected(model, batches))


def test_intra_proma_leaves_routers_alone():
    """By itself, and beside the accumulation-based variant."""
    model, batches = (
        tiny_causal_lm("Qwen3MoeForCausalLM", dtype=torch.float32),
        make_batches("gemma2-softcap", 3, count=2),
    )
    plain, both = expected(model, batches), accumulate(model, batches, intra_dim=2)[0]
    accumulation = ProjectedAccumulation(model, REINFORCE(), microbatch_size=3, intra_dim=2)
    routers = [name for name in plain if name.endswith("gate.weight")]
    assert routers and not set(routers) & set(accumulation.projected_names())
    oracle.assert_close({n: both[n] for n in routers}, {n: plain[n] for n in routers})
