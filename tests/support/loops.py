"""
Training loops without a trainer, on every rank; fails where a parameter is not what one rank would have made of it.

    torchrun --nproc-per-node 2 tests/support/loops.py
"""

import copy
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from proma_trl import ProjectedAccumulation, ProjectionSettings
from support.models import SIZES, tiny_model

K, MICROBATCHES, RATE = 3, 4, 100.0


def microbatch(index, rank):
    """Tokens `(k, 9)` and advantages `(k,)` of a rank's microbatch. The last one of rank 1 is smaller."""
    k = K - 1 if (index, rank) == (MICROBATCHES - 1, 1) else K
    generator = torch.Generator().manual_seed(10 * index + rank)
    tokens = torch.randint(3, SIZES["vocab_size"], (k, 9), generator=generator)
    return tokens, torch.randn(k, generator=generator)


def negative_log_probs(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    return -logits.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1).sum(1)


def accumulate(model, base, batches, scope="local", accelerator=None, prepare=None, settings=None):
    """Accumulates `batches` and takes a step of gradient descent; `model` may be a wrapper around `base`."""
    accumulation = ProjectedAccumulation(
        base, settings, microbatch_size=max(len(a) for _, a in batches), scope=scope, accelerator=accelerator
    )
    for i, (tokens, advantages) in enumerate(batches):
        last = i == len(batches) - 1
        if accelerator is not None:
            accelerator.gradient_state._set_sync_gradients(last)
        if prepare is not None:
            prepare(last)
        with accumulation.capture():
            objective = negative_log_probs(model, tokens)
        accumulation.loss(objective, advantages).backward()
    with torch.no_grad():
        for param in base.parameters():
            param.sub_(RATE * param.grad)
            param.grad = None
    accumulation.detach()


def weights(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().double()
        for name, p in model.named_parameters()
    }


def expected(model, scope, settings=None):
    """What one rank makes of it: each rank's accumulation by itself, averaged, or all sequences together."""
    world = dist.get_world_size()
    before = weights(model)
    batches = [[microbatch(i, rank) for i in range(MICROBATCHES)] for rank in range(world)]
    if scope == "global":
        # Advantages over W: one rank's mean over W times as many sequences
        union = [[torch.cat(x) for x in zip(*together, strict=True)] for together in zip(*batches, strict=True)]
        batches = [[(tokens, advantages / world) for tokens, advantages in union]]
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    for accumulation in batches:
        alone = copy.deepcopy(model)
        accumulate(alone, alone, accumulation, settings=settings)
        for name, value in weights(alone).items():
            total[name] += (before[name] - value) / len(batches)
    return total


def ddp(model, scope):
    accelerator = Accelerator(cpu=True)
    wrapped = DistributedDataParallel(model)

    def prepare(last):
        wrapped.require_backward_grad_sync = last

    return wrapped, model, accelerator if scope == "global" else None, prepare


def sharded(model, scope, **policy):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    accelerator = Accelerator(cpu=True) if scope == "global" else None
    return model, model, accelerator, model.set_requires_gradient_sync


def mixed(model, scope):
    return sharded(model, scope, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def distance(found, want):
    difference = torch.stack([(found[name] - want[name]).norm() for name in want]).norm()
    return (difference / torch.stack([value.norm() for value in want.values()]).norm()).item()


def check(architecture, wrap, scope, tolerance):
    original = tiny_model(architecture)
    want = expected(original, scope)
    model, base, accelerator, prepare = wrap(copy.deepcopy(original), scope)
    own = [microbatch(i, dist.get_rank()) for i in range(MICROBATCHES)]
    accumulate(model, base, own, scope, accelerator, prepare)
    before, after = weights(original), weights(base)
    found = {name: before[name] - after[name] for name in before}
    if tolerance is not None:
        for name, value in want.items():
            error = ((found[name] - value).norm() / value.norm()).item()
            assert error <= tolerance or value.norm() < 1e-6, f"{architecture} {wrap.__name__} {scope} {name}: {error}"
    else:
        reinforce = expected(original, scope, ProjectionSettings(method="none"))
        near, far = distance(found, want), distance(found, reinforce)
        assert near < 0.4 * far, f"{architecture} {wrap.__name__} {scope}: {near} from PROMA, {far} from REINFORCE"


def reduced_too_early():
    model, base, _, _ = sharded(tiny_model("llama-untied"), "local")
    try:
        accumulate(model, base, [microbatch(i, 0) for i in range(2)])
    except RuntimeError as error:
        assert "set_requires_gradient_sync" in str(error)
    else:
        raise AssertionError("gradients were reduced in every microbatch, unnoticed")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for scope in ("local", "global"):
        for architecture in ("llama-untied", "qwen3-tied", "gpt2"):
            check(architecture, ddp, scope, 1e-4)
        for architecture in ("llama-untied", "qwen3-tied"):
            check(architecture, sharded, scope, 1e-4)
            check(architecture, mixed, scope, None)
    reduced_too_early()
    if dist.get_rank() == 0:
        print("all held")
    # Gloo's threads end with the last reference to a group, and need a living interpreter to let go of its tensors
    gc.collect()
    dist.destroy_process_group()
