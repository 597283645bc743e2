"""
Modelled time of a whole optimizer step on a GPU, beside GRPOTrainer's, counted kernel by kernel without a GPU.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --device a100 h100 h200 --model 0.6B 8B --grid 512:8 1024:8 --algorithm proma
    python benchmarks/roofline.py --kernels
    python benchmarks/roofline.py --measure
    python benchmarks/roofline.py --extrapolate --model 0.6B 8B --lengths lognormal:180:0.6:1024 --algorithm proma

The trainers are the real ones. They run on fake tensors, which have shapes and no memory, and the package takes a
GPU's branches. Every kernel that PyTorch is asked for is counted, with its operations and its bytes. `reinforce` is
PROMATrainer with nothing to project. The assumptions:

- A kernel takes the larger of its operations at 65% of the peak of their dtype, and its bytes at 85% of the memory's
  bandwidth. Launches, gaps between kernels and the host take no time, and kernels run one after another. Small
  factorizations, sorts and sums in several passes are therefore far cheaper here than on a device.
- The figures are those of NVIDIA's data sheets, dense and for the SXM modules: A100 80 GB (312, 19.5 and 9.7 TFLOP/s
  in half, single and double precision, 2,039 GB/s), H100 (989, 67, 34, 3,350 GB/s) and H200 (as the H100, 4,800 GB/s).
  Products of half-precision matrices run on tensor cores; those in single precision do not use TF32.
- A product of matrices takes 2 m n k operations. Attention is causal: 2 k heads T^2 (head size) operations forward and
  2.5 times as many backward, and it reads and writes its arguments and results alone. Any other kernel takes one
  operation for each element of its largest tensor, on the ordinary cores.
- A kernel reads each of its tensors once and writes each of its results once. A broadcast dimension counts once, as
  does memory that a kernel is given twice. What is changed in place is read and written. Views cost nothing. A lookup
  by index reads the rows that it returns, and an addition by index reads and writes the rows that it is given.
- Without `--cache`, all bytes come from memory. With it, half of the L2 cache (40 MB on the A100, 50 MB on the others,
  in two halves each) holds the pages of 32 KiB that were used last, and what is read there costs nothing. Writes
  always cost, and lookups and additions by index go past the cache. Memory that is freed stays in the cache until
  other pages replace it.
- TRL's Triton kernels count by formula: the forward one reads a tile of logits, the backward one reads and writes it.
- An optimizer step is the first microbatch, the last, and as many between them as there are, which are all alike.
  Clipping and AdamW follow, in TRL's default, the fused one. What only a trainer's first step does is left out:
  checks, and the making of the optimizer's state.
- Weights are in float32, and the forward pass is autocast to bfloat16 as on a CPU, whose list of operations in float32
  differs from CUDA's; the models of this benchmark use none of those. All positions of all completions are scored.
  Gradient checkpointing is off without `--checkpointing`, though TRL's default is on.
- Copies between host and device are not modelled. Nothing runs out of memory.

With a distribution of lengths, microbatches are those of an optimizer step on a rollout of 1,024 sequences, in the
layouts of `lengths.py`, and in a random order. Ratios are to GRPOTrainer's padded step. Where there is padding,
attention works on the whole square, as with the mask that it is given then, and the head scores real tokens alone, as
TRL's does on CUDA. Where all microbatches of a layout are as wide, those between the first and the last are alike. A
packed step is counted as one whose sequences are all as long as their mean, with the attention of the true ones: each
sequence attends to itself alone.

`--measure` does the same for the running CPU, whose peak and bandwidth it measures, with the branches that the package
takes there, and runs real steps of a small model in float32 beside it. That says how far the model can be trusted
where both can be had.
"""

import argparse
import random
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil, prod
from pathlib import Path
from statistics import median
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import trl.kernels.chunked_logprob as chunked_logprob
import trl.trainer.utils as trl_utils
from common import (
    ALGORITHMS,
    REFERENCE,
    REINFORCE,
    make_algorithm_trainer,
    make_inputs,
    make_parser,
    median_ratio,
    step,
    take_turns,
    write,
)
from lengths import LAYOUTS, PROMPT_LENGTHS, Lengths, Tokens, draw_rollout, real_tokens, tokens
from shapes import SHAPES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import GRPOTrainer

from proma_trl import PROMATrainer, devices
from proma_trl.torch_internals import backward_runs

aten = torch.ops.aten

PAGE = 32 * 1024
# Elements of tensors of integers that are computed, and not only counted
_SMALL = 2**24


class Kernel(NamedTuple):
    """A kernel that ran: what it is, which function asked for it, and its work."""

    name: str
    caller: str
    operations: int
    precision: str  # "half", "single" or "double"
    bytes_moved: int


@dataclass(frozen=True)
class Device:
    """The figures of a device: operations and bytes a second, and the part of them that kernels reach."""

    half: float
    single: float
    double: float
    bandwidth: float
    cache: int = 0
    of_peak: float = 0.65
    of_bandwidth: float = 0.85

    def compute_seconds(self, kernel: Kernel) -> float:
        """Time of a kernel's operations."""
        return kernel.operations / (self.of_peak * getattr(self, kernel.precision))

    def memory_seconds(self, kernel: Kernel) -> float:
        """Time of a kernel's bytes."""
        return kernel.bytes_moved / (self.of_bandwidth * self.bandwidth)

    def seconds(self, kernel: Kernel) -> float:
        """Modelled time of a kernel."""
        return max(self.compute_seconds(kernel), self.memory_seconds(kernel))


DEVICES = {
    "a100": Device(312e12, 19.5e12, 9.7e12, 2.039e12, 40 * 10**6),
    "h100": Device(989e12, 67e12, 34e12, 3.35e12, 50 * 10**6),
    "h200": Device(989e12, 67e12, 34e12, 4.8e12, 50 * 10**6),
}


class Region(NamedTuple):
    """The memory that a tensor covers: a storage, the first byte, and steps and sizes from the outermost dimension."""

    storage: int
    start: int
    dims: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that belong to the tensor."""
        return prod(size for _, size in self.dims)

    def pages(self) -> Iterator[tuple[tuple[int, int], int]]:
        """The pages that it lies in, and its bytes there."""
        outer, run = list(self.dims), 1
        while outer and outer[-1][0] - run < PAGE:  # gaps that are shorter than a page count as bytes
            stride, size = outer.pop()
            run += stride * (size - 1)
        for offsets in product(*(range(0, stride * size, stride) for stride, size in outer)):
            start = self.start + sum(offsets)
            stop = start + run
            for page in range(start // PAGE, (stop - 1) // PAGE + 1):
                yield (self.storage, page), min(stop, (page + 1) * PAGE) - max(start, page * PAGE)


class Cache:
    """
    The pages of memory that were used last.

    Args:
        capacity (`int`): How many bytes it holds.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity // PAGE
        self._pages: OrderedDict[tuple[int, int], None] = OrderedDict()

    def read(self, region: Region) -> int:
        """Use a region. Returns how many of its bytes were not held."""
        return min(region.num_bytes, sum(size for page, size in region.pages() if not self._use(page)))

    def write(self, region: Region) -> None:
        """Use a region whose bytes need not come from memory."""
        for page, _ in region.pages():
            self._use(page)

    def _use(self, page: tuple[int, int]) -> bool:
        held = page in self._pages
        if held:
            self._pages.move_to_end(page)
        else:
            self._pages[page] = None
            if len(self._pages) > self._capacity:
                self._pages.popitem(last=False)
        return held


class Storages:
    """Numbers for storages, in the order in which they are met."""

    def __init__(self):
        # A weak reference keeps an address from being given to another storage
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}

    def region(self, tensor: torch.Tensor) -> Region:
        """The memory that a tensor covers."""
        itemsize = tensor.element_size()
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        dims = [(1, itemsize)]
        for stride, size in sorted((stride * itemsize, size) for stride, size in pairs if stride and size != 1):
            inner_stride, inner_size = dims[-1]
            if stride == inner_stride * inner_size:
                dims[-1] = (inner_stride, inner_size * size)
            else:
                dims.append((stride, size))
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = (StorageWeakRef(storage), len(self._numbers))
        _, number = self._numbers[storage._cdata]
        return Region(number, tensor.storage_offset() * itemsize, tuple(reversed(dims)))


# The factors of a product, by their names among its arguments
_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
}
# Operations of attention, relative to the forward pass
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 1.0,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 2.5,
}
# What runs no kernel, beside views
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_local_scalar_dense",
    "_fused_sdp_choice",
}
# What changes its first argument without reading it
_OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"}
# What reads as much of its first argument as it returns
_LOOKUPS = {"index", "index_select", "gather", "embedding", "take"}
# What changes as much of its first argument as another argument has
_BY_INDEX = {
    "index_add": "source",
    "index_copy": "source",
    "scatter_add": "src",
    "scatter": "src",
    "index_put": "values",
    "_index_put_impl": "values",
}
# With `out_dtype`, which no CPU has
_WIDE_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}

# A tensor, and how many of its elements were read or written, if not all
Use = tuple[torch.Tensor, int | None]


class KernelCounter(TorchDispatchMode):
    """
    Counts the kernels that PyTorch is asked for. Within a `FakeTensorMode`, it computes what no fake tensor
    enters, such as masks and numbers of tokens.

    Args:
        cache ([`Cache`], *optional*): Where reads may find what they need.

    Attributes:
        kernels (`Counter`): How often each [`Kernel`] ran.
    """

    def __init__(self, cache: Cache | None = None):
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self._cache = cache
        self._storages = Storages()

    def take(self) -> Counter[Kernel]:
        """What was counted since the last call."""
        kernels, self.kernels = self.kernels, Counter()
        return kernels

    def record(self, name: str, operations: int, precision: str, reads: Sequence[Use], writes: Sequence[Use]) -> None:
        """A kernel ran."""
        bytes_moved = 0
        for region, part in self._regions(reads).items():
            if part is None:
                bytes_moved += region.num_bytes if self._cache is None else self._cache.read(region)
            else:
                bytes_moved += min(part, region.num_bytes)
        for region, part in self._regions(writes).items():
            if part is None and self._cache is not None:
                self._cache.write(region)
            bytes_moved += region.num_bytes if part is None else min(part, region.num_bytes)
        self.kernels[Kernel(name, _caller(), operations, precision, bytes_moved)] += 1

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        if name in ("index", "index_put", "_index_put_impl"):
            args = (args[0], _without_masks(args[1]), *args[2:])
        elif name == "masked_select":
            values, mask = args
            shape = torch.broadcast_shapes(values.shape, mask.shape)
            with unset_fake_temporarily():
                mask = mask.expand(shape)
            func, args = aten.index.Tensor, (values.expand(shape), _without_masks([mask]))
            name = _name(func)
        result = _run(func, args, kwargs)
        if not _is_free(func):
            arguments = _arguments(func, args, kwargs)
            reads, writes = _traffic(func, arguments, result)
            if reads or writes:
                operations, precision = _work(name, arguments, reads + writes)
                self.record(_full_name(func), operations, precision, reads, writes)
        return result

    def _regions(self, uses: Sequence[Use]) -> dict[Region, int | None]:
        """Bytes that are used of each region: `None` for all."""
        regions: dict[Region, int | None] = {}
        for tensor, elements in uses:
            if tensor.numel() > 0:
                region = self._storages.region(tensor)
                before = regions.get(region, 0)
                whole = elements is None or before is None
                regions[region] = None if whole else before + elements * tensor.element_size()
        return regions


def _full_name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _name(func: Any) -> str:
    """The name of an operation, in place or not."""
    return _full_name(func).removesuffix("_")


def _is_free(func: Any) -> bool:
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
    is_view |= torch.Tag.inplace_view in func.tags
    return is_view or _full_name(func) in _FREE or func.namespace != "aten"


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that were given, by name."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with those places in the stead of masks at which they are true."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name, tensors = _name(func), _tensors((args, kwargs))
    fake = any(isinstance(x, FakeTensor) for x in tensors)
    if fake and name == "_local_scalar_dense":
        return _one(tensors[0].dtype)
    if fake and name in ("allclose", "equal"):
        return True
    if fake and name in _WIDE_PRODUCTS and "dtype" in func._overloadname:
        left, right = tensors[-2:] if "out" not in kwargs else tensors[-3:-1]
        return kwargs["out"] if "out" in kwargs else (left @ right).to(args[-1])
    if not tensors:
        made = func(*args, **kwargs)
        if not isinstance(made, FakeTensor) or made.is_floating_point() or made.numel() > _SMALL:
            return made
    elif fake:
        return func(*args, **kwargs)
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _one(dtype: torch.dtype) -> bool | int | float:
    """What a fake number is taken for."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _traffic(func: Any, arguments: Mapping[str, Any], result: Any) -> tuple[list[Use], list[Use]]:
    """What a kernel reads and writes."""
    name, schema = _name(func), func._schema
    made = [] if schema.is_mutable else _tensors(result)
    first = schema.arguments[0].name if schema.arguments else None
    reads: list[Use] = []
    writes: list[Use] = [(x, None) for x in made]
    for argument in schema.arguments:
        tensors = _tensors(arguments.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if name == "_fused_adamw" and argument.name == "grads":
            is_written = False  # only a scaler of losses changes them
        if is_written and argument.name == first and name in _BY_INDEX:
            continue
        if not argument.is_out and not (is_written and _full_name(func) in _OVERWRITES):
            part = made[0].numel() if made and argument.name == first and name in _LOOKUPS else None
            reads += [(x, part) for x in tensors]
        if is_written:
            writes += [(x, None) for x in tensors]
    if name in _BY_INDEX:
        target = made[0] if made else arguments[first]
        source = arguments.get(_BY_INDEX[name], arguments.get("index"))
        writes.append((target, source.numel()))
        if "add" in name or arguments.get("accumulate", False):
            reads.append((target, source.numel()))
    if name == "embedding_dense_backward":
        rows = (made[0], arguments["grad_output"].numel())
        reads.append(rows)
        writes.append(rows)
    return reads, writes


def _work(name: str, arguments: Mapping[str, Any], uses: Sequence[Use]) -> tuple[int, str]:
    """Operations of a kernel, and the precision of the units that do them."""
    if name in _FACTORS:
        left, right = (arguments[factor] for factor in _FACTORS[name])
        columns = right.shape[-1] if right.dim() > 1 else 1
        return 2 * left.numel() * columns, _matrix_precision(left.dtype)
    if name in _ATTENTION:
        query, key = arguments["query"], arguments["key"]
        part = _ATTENTION[name] / 2 if arguments.get("is_causal", False) else _ATTENTION[name]
        return round(4 * query.numel() * key.shape[-2] * part), _matrix_precision(query.dtype)
    elements = max(x.numel() if part is None else part for x, part in uses)
    return elements, "double" if any(x.dtype == torch.float64 for x, _ in uses) else "single"


def _matrix_precision(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "double"
    return "half" if dtype in (torch.bfloat16, torch.float16) else "single"


_PLACES: dict[CodeType, str | None] = {}


def _caller() -> str:
    """The innermost function of the package, TRL, transformers or an optimizer that runs, or what else does."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code not in _PLACES:
            module = frame.f_globals.get("__name__", "")
            known = module.split(".")[0] in ("proma_trl", "trl", "transformers") or module.startswith("torch.optim.")
            _PLACES[code] = f"{module.split('.')[-1]}.{code.co_qualname}" if known else None
        if _PLACES[code] is not None:
            return _PLACES[code]
        frame = frame.f_back
    return "autograd" if backward_runs() else "PyTorch"


class TritonKernel:
    """
    Stands for a Triton kernel of TRL's fused head.

    Args:
        counter ([`KernelCounter`]): Counts it.
        kernel (`Any`): What it stands for. `fn` is its function, as it is of a Triton kernel.
        writes (`bool`): Whether it writes the tile of logits that it reads.
    """

    def __init__(self, counter: KernelCounter, kernel: Any, writes: bool):
        self.fn = getattr(kernel, "fn", kernel)
        self._counter, self._writes = counter, writes

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, tile: torch.Tensor, *arguments: Any, **settings: Any) -> None:
        use = [(tile, None)]
        self._counter.record(f"triton{self.fn.__name__}", tile.numel(), "single", use, use if self._writes else [])


def _address(tensor: FakeTensor) -> int:
    """What tells the memory of a fake tensor from others'."""
    return (tensor.untyped_storage()._cdata << 48) + tensor.storage_offset() * tensor.element_size()


def _add_wide(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """TRL's sum of products, in the branch for a GPU."""
    if left.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@contextmanager
def counting(on_gpu: bool, cache: Cache | None = None) -> Iterator[KernelCounter]:
    """Within the context, tensors are fake, and their kernels are counted: those of a GPU, or those of a CPU."""
    counter = KernelCounter(cache)
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        replace(FakeTensor, "data_ptr", _address)
        # All is on one device, and PyTorch does not move modules with fake parameters
        replace(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
        if on_gpu:
            replace(devices, "ACCELERATORS", {*devices.ACCELERATORS, "cpu"})
            replace(torch.Tensor, "pin_memory", lambda tensor: tensor)
            replace(torch.cuda, "get_rng_state", lambda device: torch.zeros(1, dtype=torch.uint8))
            replace(torch.cuda, "set_rng_state", lambda state, device: None)
            for module in (chunked_logprob, trl_utils):
                replace(module, "_use_triton", lambda device: True)
            replace(chunked_logprob, "_addmm_fp32", _add_wide)
            for name, writes in (("_forward_kernel", False), ("_backward_kernel", True)):
                kernel = TritonKernel(counter, getattr(chunked_logprob, name), writes)
                replace(chunked_logprob, name, kernel)
            triton = SimpleNamespace(cdiv=lambda a, b: ceil(a / b))
            stack.enter_context(patch.object(chunked_logprob, "triton", triton, create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(counter)


def make_full_inputs(arguments: argparse.Namespace, length: int, seed: int) -> dict[str, torch.Tensor]:
    """A microbatch in which no token is padding."""
    inputs = make_inputs(arguments, length, seed)
    inputs["completion_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum() * arguments.microbatches
    return inputs


def make_checked_trainer(arguments: argparse.Namespace, length: int, algorithm: str) -> GRPOTrainer:
    """A prepared trainer of an algorithm, whose checks of the first microbatch are over."""
    trainer = make_algorithm_trainer(arguments, length, algorithm)
    trainer._checked = True
    if isinstance(trainer, PROMATrainer):
        trainer._probe_padding(trainer.model)
    return trainer


def make_rollout_inputs(
    microbatch: Sequence[Tokens], widths: tuple[int, int], vocabulary: int, num_items: int
) -> dict[str, torch.Tensor]:
    """A microbatch of sequences as TRL pads them, to `widths` of prompts and completions, of a step of `num_items`."""
    prompts, completions = (torch.tensor(x).unsqueeze(1) for x in zip(*microbatch, strict=True))
    generator, k = torch.Generator().manual_seed(0), len(microbatch)
    ids = torch.randint(3, vocabulary, (k, sum(widths)), generator=generator)
    return {
        "prompt_ids": ids[:, : widths[0]],
        "prompt_mask": (torch.arange(widths[0]) >= widths[0] - prompts).long(),
        "completion_ids": ids[:, widths[0] :],
        "completion_mask": (torch.arange(widths[1]) < completions).long(),
        "advantages": torch.randn(k, generator=generator),
        "num_items_in_batch": torch.tensor(num_items),
    }


class RolloutStep(NamedTuple):
    """
    An optimizer step on a rollout.

    Args:
        microbatches (`list[list[Tokens]]`): Their sequences.
        widths (`list[tuple[int, int]]`): Their columns of prompts and of completions.
        num_tokens (`int`): Real tokens.
        attention (`float`): What attention takes, by what it takes for these microbatches.
    """

    microbatches: list[list[Tokens]]
    widths: list[tuple[int, int]]
    num_tokens: int
    attention: float = 1.0

    @property
    def positions(self) -> float:
        """Positions for each real token."""
        pairs = zip(self.microbatches, self.widths, strict=True)
        return sum(len(part) * sum(width) for part, width in pairs) / self.num_tokens


def rollout_step(
    completions: Lengths, prompts: Lengths, layout: str, sequences: int, microbatches: int
) -> RolloutStep:
    """The first optimizer step on a rollout of 1,024 sequences, or of one step's where these are more."""
    size = sequences * microbatches
    rollout = draw_rollout(completions, prompts, max(1024 // size, 1) * size, sequences, seed=0)
    random.Random(0).shuffle(rollout)
    step = rollout[:size]
    real = real_tokens(step)
    if layout == "packed":
        mean = Tokens(*(max(1, round(sum(x) / size)) for x in zip(*step, strict=True)))
        attention = sum(sum(x) ** 2 for x in step) / (size * sum(mean) ** 2)
        return RolloutStep([[mean] * sequences] * microbatches, [tuple(mean)] * microbatches, real, attention)
    parts = LAYOUTS[layout](step, microbatches)
    random.Random(1).shuffle(parts)
    if layout == "aligned":
        # Columns of the shortest prompt are prompts' in all rows, and what follows counts as completions
        shortest = [min(x.prompt for x in part) for part in parts]
        parts = [[Tokens(n, sum(x) - n) for x in part] for n, part in zip(shortest, parts, strict=True)]
    wholes = [rollout] * microbatches if layout == "padded" else parts
    widths = [(max(x.prompt for x in whole), max(x.completion for x in whole)) for whole in wholes]
    return RolloutStep(parts, widths, real)


def count_rollout_step(arguments: argparse.Namespace, step: RolloutStep, algorithm: str) -> Counter[Kernel]:
    """
    The kernels of an optimizer step on a rollout, on a GPU.

    Args:
        arguments (`argparse.Namespace`): Options of `common.make_parser`, with a `device` of `"cpu"`.
        step ([`RolloutStep`]): The step.
        algorithm (`str`): One of `ALGORITHMS`, `"reinforce"` or `"grpo"`.
    """
    num_items = sum(x.completion for part in step.microbatches for x in part)
    inputs = [
        make_rollout_inputs(part, width, arguments.vocabulary, num_items)
        for part, width in zip(step.microbatches, step.widths, strict=True)
    ]
    if len(set(step.widths)) == 1:
        inputs = [inputs[0], *[inputs[len(inputs) // 2]] * (len(inputs) - 2), inputs[-1]]
    length = max(map(sum, step.widths))
    arguments = argparse.Namespace(**vars(arguments) | {"sequences": max(map(len, step.microbatches))})
    kernels = count_microbatches(arguments, length, algorithm, inputs, True, None)
    return Counter(
        {
            kernel._replace(operations=round(step.attention * kernel.operations))
            if kernel.name in _ATTENTION
            else kernel: count
            for kernel, count in kernels.items()
        }
    )


def count_step(
    arguments: argparse.Namespace, length: int, algorithm: str, on_gpu: bool = True, cache_bytes: int | None = None
) -> Counter[Kernel]:
    """
    The kernels of an optimizer step on sequences of one length.

    Args:
        arguments (`argparse.Namespace`): Options of `common.make_parser`, with a `device` of `"cpu"`.
        length (`int`): Tokens of a sequence.
        algorithm (`str`): One of `ALGORITHMS`, `"reinforce"` or `"grpo"`.
        on_gpu (`bool`): Whether the branches for GPUs are taken.
        cache_bytes (`int`, *optional*): Capacity of a cache.
    """
    first, other = (make_full_inputs(arguments, length, seed) for seed in range(2))
    inputs = [first, *[other] * (arguments.microbatches - 1)] if arguments.microbatches > 1 else [other]
    return count_microbatches(arguments, length, algorithm, inputs, on_gpu, cache_bytes)


def count_microbatches(
    arguments: argparse.Namespace,
    length: int,
    algorithm: str,
    microbatches: Sequence[dict[str, torch.Tensor]],
    on_gpu: bool,
    cache_bytes: int | None,
) -> Counter[Kernel]:
    """
    The kernels of an optimizer step on these microbatches. They are real tensors, so that what depends on masks is
    known. The same one again, neither first nor last, is counted once.
    """
    with counting(on_gpu, None if cache_bytes is None else Cache(cache_bytes)) as counter:
        trainer = make_checked_trainer(arguments, length, algorithm)
        counter.take()

        def count(inputs: dict[str, torch.Tensor], is_last: bool) -> Counter[Kernel]:
            trainer.accelerator.gradient_state._set_sync_gradients(is_last)
            loss = trainer.compute_loss(trainer.model, inputs)
            trainer.accelerator.backward(loss)
            return counter.take()

        total: Counter[Kernel] = Counter()
        kernels: Counter[Kernel] = Counter()
        last = len(microbatches) - 1
        for i, inputs in enumerate(microbatches):
            if not (1 < i < last and inputs is microbatches[i - 1]):
                kernels = count(inputs, is_last=i == last)
            total += kernels
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        total += counter.take()
        trainer.optimizer.step()
        counter.take()  # the optimizer made its state
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        total += counter.take()
    return total


def modelled_seconds(kernels: Counter[Kernel], device: Device) -> float:
    """Modelled time of counted kernels."""
    return sum(count * device.seconds(kernel) for kernel, count in kernels.items())


def extrapolated(one: Counter[Kernel], two: Counter[Kernel], layers: int) -> Counter[Kernel]:
    """The kernels of a model of `layers` layers, from those of one and of two: layers are alike."""
    return Counter({kernel: one[kernel] + (layers - 1) * (two[kernel] - one[kernel]) for kernel in one | two})


def measured_cpu() -> Device:
    """The running CPU: what a large product and a large copy reach."""

    def best(function: Callable[[], Any]) -> float:
        taken = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        return min(taken)

    matrix, memory = torch.randn(2048, 2048), torch.randn(2**26)
    target = torch.empty_like(memory)
    peak = 2 * 2048**3 / best(lambda: matrix @ matrix)
    bandwidth = 2 * memory.nbytes / best(lambda: target.copy_(memory))
    return Device(peak, peak, peak / 2, bandwidth, of_peak=1.0, of_bandwidth=1.0)


def most_expensive(kernels: Counter[Kernel], device: Device, count: int = 10) -> str:
    """A table of the kernels that take longest, those of the same name and caller together."""
    groups: dict[tuple[str, str], list[tuple[Kernel, int]]] = {}
    for kernel, calls in kernels.items():
        groups.setdefault((kernel.name, kernel.caller), []).append((kernel, calls))
    total = modelled_seconds(kernels, device)
    seconds = {key: sum(n * device.seconds(kernel) for kernel, n in group) for key, group in groups.items()}
    lines = [f"{'calls':>8} {'ms':>9} {'share':>7} {'GB':>8} {'bound by':>10}  kernel, called by"]
    for key in sorted(groups, key=lambda key: (-seconds[key], key))[:count]:
        group = groups[key]
        computing = sum(
            n * device.seconds(kernel)
            for kernel, n in group
            if device.compute_seconds(kernel) > device.memory_seconds(kernel)
        )
        bound = "operations" if computing > seconds[key] / 2 else "bytes"
        gigabytes = sum(n * kernel.bytes_moved for kernel, n in group) / 1e9
        lines.append(
            f"{sum(n for _, n in group):>8} {seconds[key] * 1e3:>9.2f} {seconds[key] / total:>7.1%} "
            f"{gigabytes:>8.1f} {bound:>10}  {key[0]}, {key[1]}"
        )
    return "\n".join(lines)


def count_model(
    arguments: argparse.Namespace,
    model: str,
    length: int | RolloutStep,
    sequences: int,
    algorithm: str,
    device: str,
) -> Counter[Kernel]:
    """The kernels of a step of a model and an algorithm on a device, by the command line's options."""
    on_gpu = device != "cpu"
    case = make_parser(
        "",
        device="cpu",
        bf16=on_gpu,
        checkpointing=arguments.checkpointing,
        prompt=arguments.prompt,
        budget=arguments.budget,
        microbatches=arguments.microbatches,
        sequences=sequences,
    ).parse_args(["--model", model])
    layers = arguments.layers or case.layers
    cache = DEVICES[device].cache // 2 if arguments.cache and on_gpu else None

    def count(layers: int) -> Counter[Kernel]:
        case.layers = layers
        with redirect_stdout(sys.stderr):  # the table alone goes to the output
            if isinstance(length, RolloutStep):
                return count_rollout_step(case, length, algorithm)
            return count_step(case, length, algorithm, on_gpu, cache)

    return extrapolated(count(1), count(2), layers) if arguments.extrapolate else count(layers)


def model_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table of modelled steps, and return its rows."""
    results, details = [], []
    print(f"{'device':>6} {'model':>6} {'T':>6} {'k':>3} {'algorithm':>12} {'ms':>10} {'ratio':>7}")
    # Devices that run the same kernels, with the same cache, are counted once
    groups: dict[tuple[bool, int], list[str]] = {}
    for name in arguments.device:
        groups.setdefault((name == "cpu", DEVICES[name].cache if arguments.cache else 0), []).append(name)
    for names, model, (length, sequences) in product(groups.values(), arguments.model, arguments.grid):
        reference: dict[str, float] = {}
        for algorithm in dict.fromkeys([REFERENCE, *arguments.algorithm]):
            kernels = count_model(arguments, model, length, sequences, algorithm, names[0])
            for name in names:
                seconds = modelled_seconds(kernels, DEVICES[name])
                ratio = seconds / reference.setdefault(name, seconds)
                results.append(
                    {
                        "device": name,
                        "model": model,
                        "length": length,
                        "sequences": sequences,
                        "algorithm": algorithm,
                        "seconds": seconds,
                        "ratio": ratio,
                    }
                )
                row = f"{name:>6} {model:>6} {length:>6} {sequences:>3} {algorithm:>12}"
                print(f"{row} {seconds * 1e3:>10.2f} {ratio:>7.3f}", flush=True)
                details.append(f"{' '.join(row.split())}\n{most_expensive(kernels, DEVICES[name])}")
    if arguments.kernels:
        print("\n" + "\n\n".join(details))
    return results


def rollout_model_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table of modelled steps on rollouts, and return its rows."""
    results, details = [], []
    columns = f"{'algorithm':>12} {'layout':>9} {'positions':>10} {'ms':>10} {'ratio':>7}"
    print(f"{'device':>6} {'model':>6} {'T':>24} {columns}")
    for model, lengths in product(arguments.model, arguments.lengths):
        reference: dict[str, float] = {}
        pairs = [(REFERENCE, "padded"), *product(arguments.algorithm, arguments.layout)]
        for algorithm, layout in pairs:
            step = rollout_step(lengths, arguments.prompt_lengths, layout, arguments.sequences, arguments.microbatches)
            kernels = count_model(arguments, model, step, arguments.sequences, algorithm, arguments.device[0])
            for device in arguments.device:
                seconds = modelled_seconds(kernels, DEVICES[device])
                ratio = seconds / reference.setdefault(device, seconds)
                results.append(
                    {
                        "device": device,
                        "model": model,
                        "length": str(lengths),
                        "sequences": arguments.sequences,
                        "algorithm": algorithm,
                        "layout": layout,
                        "positions": step.positions,
                        "seconds": seconds,
                        "ratio": ratio,
                    }
                )
                row = f"{device:>6} {model:>6} {lengths!s:>24} {algorithm:>12} {layout:>9}"
                print(f"{row} {step.positions:>10.2f} {seconds * 1e3:>10.2f} {ratio:>7.3f}", flush=True)
                details.append(f"{' '.join(row.split())}\n{most_expensive(kernels, DEVICES[device])}")
    if arguments.kernels:
        print("\n" + "\n\n".join(details))
    return results


def measure_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print steps of a small model on the running CPU, measured and modelled, and return the rows."""
    device, results = measured_cpu(), []
    print(f"{device.single / 1e9:.0f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print(f"{'':>19} {'seconds':>19} {'ratio':>17}")
    print(f"{'T':>6} {'algorithm':>12} {'measured':>10} {'model':>8} {'measured':>10} {'model':>6}")
    case = make_parser("", device="cpu", prompt=arguments.prompt, budget=arguments.budget).parse_args([])
    algorithms = list(dict.fromkeys([REFERENCE, *arguments.algorithm]))
    for length in arguments.lengths:
        with redirect_stdout(sys.stderr):
            modelled = {
                name: modelled_seconds(count_step(case, length, name, on_gpu=False), device) for name in algorithms
            }
            microbatches = [make_full_inputs(case, length, seed) for seed in range(case.microbatches)]
            trainers = {name: make_checked_trainer(case, length, name) for name in algorithms}
            steps = {name: partial(step, trainer, microbatches, "cpu") for name, trainer in trainers.items()}
            taken = take_turns(steps, arguments.repeats)
        seconds = {name: [elapsed for elapsed, _ in turns] for name, turns in taken.items()}
        for name in algorithms:
            result = {
                "device": "cpu",
                "length": length,
                "sequences": case.sequences,
                "algorithm": name,
                "measured_seconds": median(seconds[name]),
                "seconds": modelled[name],
                "measured_ratio": median_ratio(seconds[name], seconds[REFERENCE]),
                "ratio": modelled[name] / modelled[REFERENCE],
            }
            results.append(result)
            print(
                f"{length:>6} {name:>12} {result['measured_seconds']:>10.3f} {result['seconds']:>8.3f} "
                f"{result['measured_ratio']:>10.3f} {result['ratio']:>6.3f}",
                flush=True,
            )
    return results


def grid_point(text: str) -> tuple[int, int]:
    """`512:8`: 512 tokens a sequence, 8 sequences a microbatch."""
    length, sequences = text.split(":")
    return int(length), int(sequences)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", default=["h100"], choices=[*DEVICES, "cpu"])
    parser.add_argument("--model", nargs="+", default=["0.6B"], choices=SHAPES)
    parser.add_argument("--grid", type=grid_point, nargs="+", default=[(512, 8), (2048, 4)], help="T:k")
    parser.add_argument(
        "--algorithm",
        nargs="+",
        default=[REINFORCE, *ALGORITHMS],
        choices=[REINFORCE, *ALGORITHMS],
        help="beside GRPO",
    )
    parser.add_argument("--microbatches", type=int, default=16, help="microbatches per optimizer step")
    parser.add_argument("--prompt", type=float, default=0.5, help="the prompt's part of the tokens")
    parser.add_argument("--budget", type=float, default=10.0, help="GiB for the sequence gradients of one parameter")
    parser.add_argument("--layers", type=int, help="another number of layers than the model's")
    parser.add_argument("--extrapolate", action="store_true", help="count one and two layers only (not with --cache)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--cache", action="store_true", help="with an L2 cache")
    parser.add_argument("--kernels", action="store_true", help="list the most expensive kernels")
    parser.add_argument("--measure", action="store_true", help="compare model and measurement on this CPU")
    parser.add_argument(
        "--lengths", type=tokens, nargs="+", help="distributions of completions' lengths, or numbers with --measure"
    )
    parser.add_argument("--prompt-lengths", type=Lengths.parse, default=PROMPT_LENGTHS, help="with --lengths")
    parser.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="with --lengths")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a microbatch, with --lengths")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings = parser.parse_args(arguments)
    if settings.extrapolate and settings.cache:
        parser.error("What a cache holds does not grow in proportion to the layers.")
    if settings.measure:
        settings.lengths = settings.lengths or [128, 256, 512]
    if any(isinstance(x, Lengths) == settings.measure for x in settings.lengths or ()):
        parser.error("--lengths takes distributions, such as lognormal:180:0.6:1024, and with --measure numbers.")
    if settings.lengths and not settings.measure and (settings.cache or "cpu" in settings.device):
        parser.error("--lengths models a step on GPUs, without --cache.")
    if settings.measure:
        results = measure_steps(settings)
    elif settings.lengths:
        results = rollout_model_steps(settings)
    else:
        if "cpu" in settings.device:
            DEVICES["cpu"] = measured_cpu()
        results = model_steps(settings)
    write(settings, results)


if __name__ == "__main__":
    main()
