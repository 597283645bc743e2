"""
Other ways to compute the projection, measured beside the package's own.

    python benchmarks/alternatives.py
    python benchmarks/alternatives.py activations --lengths 8 16 32 64

For the weight of a linear layer, the package forms k sequence gradients by one batched product, their overlaps with
the accumulated gradient and their Gram matrix, solves for the coefficients, and forms the weighted sum. The
alternatives take turns with it in one process; figures are medians of each, and the median ratio of the turns to the
package's own.

- `chunks`: the same by chunks of rows that stay in cache between product, Gram matrix and overlaps ("kept": all chunks
  are kept for the weighted sum; "again": they share memory, and the weighted sum is a product of its own, as under a
  memory budget).
- `budgets`: whole optimizer steps under smaller memory budgets.
- `augmented`: the accumulated gradient as one more row of the Gram matrix, which then holds overlaps and norm.
- `activations`: Gram matrix from products of activations, overlaps from a product with the accumulated gradient.
- `solves`: the solves of many tensors as one.
- `gathered`: small tensors of one shape together.
- `shares`: what part of an optimizer step the emissions of small and of large tensors take.
- `bfloat16`: sequence gradients rounded to bfloat16, and how far that leads from float64.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    StepProfile,
    make_microbatches,
    make_parser,
    make_prepared_trainer,
    median_ratio,
    step,
    take_turns,
    write,
)
from torch import nn

from proma_trl import PROMA, InnerProducts, PROMAConfig, PROMATrainer
from proma_trl.rules.inner_products import rank_tolerance
from proma_trl.sequence_grads.forms import OuterProducts

RULE = PROMA()
SMALL = 2**16  # elements of a small tensor: norms, biases and adapters have fewer, matrices more
EMISSION = ("accumulation/emission.py", "emit")  # file and name of what makes a tensor's gradient in the package

Result = dict[str, Any]
Layer = tuple[OuterProducts, torch.Tensor, torch.Tensor]


def turns(functions: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, Result]:
    """Median milliseconds of each of the functions, which take turns, and median ratio to the first one's."""
    seconds = take_turns({name: partial(timed, function) for name, function in functions.items()}, repeats)
    reference = next(iter(seconds.values()))
    return {
        name: {"ms": 1e3 * statistics.median(taken), "ratio": median_ratio(taken, reference)}
        for name, taken in seconds.items()
    }


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def make_layer(arguments: argparse.Namespace, rows: int, columns: int, length: int) -> Layer:
    """Factors of a linear layer's sequence gradients, what has been accumulated, and advantages."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    k = arguments.sequences
    # A part that all tokens have in common, so that sequence gradients are not orthogonal
    left = randn(k, length, rows) + 0.3 * randn(rows)
    right = randn(k, length, columns) + 0.3 * randn(columns)
    return OuterProducts(left, right), randn(rows, columns), randn(k)


def gram_matrix(grads: torch.Tensor) -> torch.Tensor:
    """`grads @ grads^T` for `(k, n)`, in small pieces that are summed in float64, as the package forms it."""
    k, n = grads.shape
    pieces = grads.view(k, math.gcd(n, 64), -1).transpose(0, 1)
    return torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64)


def solve(
    gram: torch.Tensor, overlaps: torch.Tensor, advantages: torch.Tensor, precision: torch.dtype = torch.float32
) -> torch.Tensor:
    """The package's coefficients, in float64 as there, from products of `precision`."""
    tolerance = rank_tolerance(gram.shape[-1], precision, precision)
    products = InnerProducts(gram.double(), overlaps.double(), gram.new_ones(()).double(), rank_tolerance=tolerance)
    return RULE.coefficients(products, advantages.double()).to(precision)


def own(
    parts: OuterProducts,
    acc: torch.Tensor,
    advantages: torch.Tensor,
    out: torch.Tensor,
    chunk_rows: int | None = None,
    again: bool = False,
) -> torch.Tensor:
    """As in the package, or by chunks of rows. `again`: chunks share memory, and are not there to be summed."""
    grams, overlaps = [], []
    rows = len(acc)
    chunk_rows = rows if chunk_rows is None else chunk_rows
    for start in range(0, rows, chunk_rows):
        stop = min(start + chunk_rows, rows)
        grads = out[:, : stop - start] if again else out[:, start:stop]
        parts.write_rows(grads, start, stop)
        grams.append(gram_matrix(grads.flatten(1)))
        overlaps.append(grads.flatten(1) @ acc[start:stop].flatten())
    weights = solve(sum(grams), sum(overlaps), advantages)
    return parts.combine(weights) if again else (weights @ out.flatten(1)).view_as(acc)


def with_acc(parts: OuterProducts, acc: torch.Tensor, advantages: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The accumulated gradient as one more row of the Gram matrix."""
    k = len(out) - 1
    parts.write_rows(out[:k], 0, len(acc))
    out[k] = acc
    gram = gram_matrix(out.flatten(1))
    weights = solve(gram[:k, :k], gram[k, :k], advantages)
    return (weights @ out[:k].flatten(1)).view_as(acc)


def from_activations(parts: OuterProducts, acc: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """`<s_i, s_j>` is the sum over t, u of `<g_it, g_ju> <x_it, x_ju>`; no sequence gradient is formed."""
    left, right = parts.left.flatten(0, 1), parts.right.flatten(0, 1)
    k, length, _ = parts.left.shape
    gram = ((left @ left.mT).mul_(right @ right.mT)).view(k, length, k, length).sum((1, 3))
    overlaps = ((right @ acc.mT).mul_(left)).view(k, -1).sum(1)
    return parts.combine(solve(gram, overlaps, advantages))


def assert_same(value: torch.Tensor, expected: torch.Tensor) -> None:
    """Alternatives compute the same."""
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-2)


def chunks(arguments: argparse.Namespace) -> Iterator[Result]:
    for rows, columns in arguments.shapes:
        for length in arguments.lengths:
            layer = make_layer(arguments, rows, columns, length)
            k, row_bytes = arguments.sequences, 4 * arguments.sequences * columns
            out = torch.empty(k, rows, columns)
            functions = {"whole": partial(own, *layer, out)}
            for kib in (8192, 2048):
                chunk_rows = max(1, 1024 * kib // row_bytes)
                if chunk_rows < rows:
                    chunk = torch.empty(k, chunk_rows, columns)
                    functions[f"{kib} KiB kept"] = partial(own, *layer, out, chunk_rows)
                    functions[f"{kib} KiB again"] = partial(own, *layer, chunk, chunk_rows, True)
            reference = functions["whole"]()
            for function in functions.values():
                assert_same(function(), reference)
            functions["ordinary gradient"] = partial(layer[0].combine, layer[2])
            for name, taken in turns(functions, arguments.repeats).items():
                yield {"shape": f"{rows}x{columns}", "T": length, "alternative": name} | taken


def augmented(arguments: argparse.Namespace) -> Iterator[Result]:
    for rows, columns in arguments.shapes:
        for length in arguments.lengths:
            layer = make_layer(arguments, rows, columns, length)
            out = torch.empty(arguments.sequences + 1, rows, columns)
            functions = {"own": partial(own, *layer, out[:-1]), "augmented": partial(with_acc, *layer, out)}
            assert_same(functions["augmented"](), functions["own"]())
            for name, taken in turns(functions, arguments.repeats).items():
                yield {"shape": f"{rows}x{columns}", "T": length, "alternative": name} | taken


def activations(arguments: argparse.Namespace) -> Iterator[Result]:
    for rows, columns in arguments.shapes:
        for length in sorted({8, 16, 32, 64, *arguments.lengths}):
            layer = make_layer(arguments, rows, columns, length)
            k, size = arguments.sequences, rows * columns
            out = torch.empty(k, rows, columns)
            functions = {"own": partial(own, *layer, out), "activations": partial(from_activations, *layer)}
            assert_same(functions["activations"](), functions["own"]())
            flops = {
                "own": 2 * k * length * size + 2 * k * (k + 2) * size,
                "activations": 4 * k * length * size + 2 * (k * length) ** 2 * (rows + columns),
            }
            for name, taken in turns(functions, arguments.repeats).items():
                yield {
                    "shape": f"{rows}x{columns}",
                    "T": length,
                    "alternative": name,
                    "gflop": flops[name] / 1e9,
                    "predicted": flops[name] / flops["own"],
                } | taken


def solves(arguments: argparse.Namespace) -> Iterator[Result]:
    k = arguments.sequences
    for tensors in (11, 46, 310):  # of a layer of Qwen3, of the benchmark's model, of Qwen3-0.6B
        grads = torch.randn(tensors, k, 64, dtype=torch.float64)
        gram, overlaps, advantages = grads @ grads.mT, torch.randn(tensors, k).double(), torch.randn(k)
        functions = {
            "one by one": lambda g=gram, b=overlaps, a=advantages: [solve(*one, a) for one in zip(g, b, strict=True)],
            "together": partial(solve, gram, overlaps, advantages.expand(tensors, k)),
        }
        for name, taken in turns(functions, arguments.repeats).items():
            yield {"tensors": tensors, "alternative": name} | taken


def gathered(arguments: argparse.Namespace) -> Iterator[Result]:
    k = arguments.sequences
    for count, shape in ((9, (512,)), (8, (64,)), (28, (16, 576)), (28, (576, 16))):
        grads = [torch.randn(k, *shape).flatten(1) for _ in range(count)]
        accs, advantages = [torch.randn_like(g[0]) for g in grads], torch.randn(k)

        def one_by_one(grads=grads, accs=accs, advantages=advantages):
            return [solve(gram_matrix(g), g @ acc, advantages) @ g for g, acc in zip(grads, accs, strict=True)]

        def together(grads=grads, accs=accs, advantages=advantages):
            stacked, acc = torch.stack(grads), torch.stack(accs).unsqueeze(-1)
            overlaps = (stacked @ acc).squeeze(-1)
            weights = solve(stacked @ stacked.mT, overlaps, advantages.expand_as(overlaps))
            return (weights.unsqueeze(1) @ stacked).squeeze(1)

        assert_same(together(), torch.stack(one_by_one()))
        for name, taken in turns({"one by one": one_by_one, "together": together}, arguments.repeats).items():
            yield {"tensors": f"{count} of {'x'.join(map(str, shape))}", "alternative": name} | taken


def shares(arguments: argparse.Namespace) -> Iterator[Result]:
    for lora in (None, 16):
        for length in arguments.lengths:
            trainer, microbatches = make_steps(arguments, length, lora=lora)
            params = [p for p in trainer.model.parameters() if p.requires_grad]
            whole = profile_training(trainer, microbatches, params, params)
            for name, small in (("small", True), ("large", False)):
                trained = [p for p in params if (p.numel() <= SMALL) == small]
                part = profile_training(trainer, microbatches, params, trained).time(EMISSION) if trained else 0.0
                yield {
                    "trained": "LoRA" if lora else "all",
                    "T": length,
                    "tensors": f"{len(trained)} {name}",
                    "of a step": part / whole.seconds,
                }


def profile_training(
    trainer: PROMATrainer,
    microbatches: Sequence[dict[str, torch.Tensor]],
    params: Sequence[nn.Parameter],
    trained: Sequence[nn.Parameter],
) -> StepProfile:
    """A profile of steps with only the `trained` ones of `params` trainable."""
    ids = {id(param) for param in trained}
    for param in params:
        param.requires_grad_(id(param) in ids)
    step(trainer, microbatches, "cpu")  # it warms up
    return StepProfile(trainer, microbatches, 3)


def make_steps(
    arguments: argparse.Namespace,
    length: int,
    budget: float | None = PROMAConfig.projection_memory_budget,
    lora: int | None = None,
) -> tuple[PROMATrainer, list[dict[str, torch.Tensor]]]:
    """A trainer of the step-time benchmark's model, and the microbatches of a step."""
    parser = make_parser("", prompt=0.02, device="cpu", sequences=arguments.sequences, lora=lora)
    defaults = parser.parse_args([])
    trainer = make_prepared_trainer(PROMATrainer, PROMAConfig, defaults, length, projection_memory_budget=budget)
    return trainer, make_microbatches(defaults, length)


def budgets(arguments: argparse.Namespace) -> Iterator[Result]:
    for length in arguments.lengths:
        steps = {
            mib: partial(step, *make_steps(arguments, length, budget=mib / 1024), "cpu") for mib in (512, 32, 8, 2)
        }
        for mib, taken in turns(steps, min(5, arguments.repeats)).items():
            yield {"T": length, "budget MiB": mib} | taken


def bfloat16(arguments: argparse.Namespace) -> Iterator[Result]:
    for rows, columns in arguments.shapes:
        for length in arguments.lengths:
            parts, acc, advantages = make_layer(arguments, rows, columns, length)
            grads = torch.bmm(parts.left.double().mT, parts.right.double()).flatten(1)
            acc = (acc * grads.std()).double().flatten() + grads.mean(0)  # overlaps that are not noise
            exact = solve(grads @ grads.mT, grads @ acc, advantages, torch.float64) @ grads
            policy = advantages.double() @ grads
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                # Products in float32: sums are float32's, and products of bfloat16 numbers exact
                rounded = torch.bmm(parts.left.mT, parts.right).to(dtype).float().flatten(1)
                gram, overlaps = gram_matrix(rounded), rounded @ acc.float()
                weights = solve(gram, overlaps, advantages)
                yield {
                    "shape": f"{rows}x{columns}",
                    "T": length,
                    "alternative": name,
                    "coefficients": error(weights.double() @ grads, exact),
                    "emission": error((weights @ rounded).double(), exact),
                    "removal": error(weights.double() @ grads - policy, exact - policy),
                }


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error."""
    return ((value - exact).norm() / exact.norm()).item()


ALTERNATIVES = {
    "chunks": chunks,
    "augmented": augmented,
    "activations": activations,
    "solves": solves,
    "gathered": gathered,
    "shares": shares,
    "bfloat16": bfloat16,
    "budgets": budgets,
}


def parse_shape(text: str) -> tuple[int, int]:
    """Rows and columns."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "alternatives", nargs="*", metavar="alternative", help=f"any of {', '.join(ALTERNATIVES)}; all without it"
    )
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=[(512, 512), (1536, 512), (1024, 3072)])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens per sequence, T")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per microbatch, k")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = []
    for name in arguments.alternatives or ALTERNATIVES:
        print(name)
        header = None
        for result in ALTERNATIVES[name](arguments):
            if result.keys() != header:
                header = result.keys()
                print("".join(f"{key:>18}" for key in header))
            print("".join(f"{x:>18.3g}" if isinstance(x, float) else f"{x:>18}" for x in result.values()), flush=True)
            results.append({"weighed": name} | result)
    write(arguments, results)


if __name__ == "__main__":
    main()
