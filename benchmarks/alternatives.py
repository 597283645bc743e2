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
EMISSION = ("accumulation/microbatch.py", "_emit")  # file and name of what makes a tensor's gradient in the package

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


def make_layer(arguments, rows, columns, length):
    """Factors of a linear layer's sequence gradients, what has been accumulated, and advantages."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    k = arguments.sequences
    # A part that all tokens have in common, so that sequence gradients are not orthogonal
    left = randn(k, length, rows) + 0.3 * randn(rows)
    right = randn(k, length, columns) + 0.3 * randn(columns)
    return OuterProducts(left, right), randn(rows, columns), randn(k)


def coefficients(gram, overlaps, advantages):
    """The package's solve, in float64 as there."""
    tolerance = rank_tolerance(len(advantages), torch.float32, torch.float32)
    gram, overlaps, advantages = gram.double(), overlaps.double(), advantages.double()
    return solve(gram, overlaps, gram.new_ones(()), advantages, SETTINGS, tolerance).coefficients.float()


def own(parts, acc, advantages, out, step=None, again=False):
    """The package's way; by chunks of `step` rows; `again`: chunks share memory, and are not there to be summed."""
    grams, overlaps = [], []
    rows = len(acc)
    step = rows if step is None else step
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        grads = out[:, : stop - start] if again else out[:, start:stop]
        parts.write_rows(grads, start, stop)
        grams.append(_gram(grads.flatten(1), torch.float64))
        overlaps.append(grads.flatten(1) @ acc[start:stop].flatten())
    weights = coefficients(sum(grams), sum(overlaps), advantages)
    return parts.combine(weights) if again else (weights @ out.flatten(1)).view_as(acc)


def with_acc(parts, acc, advantages, out):
    """The accumulated gradient as one more row of the Gram matrix."""
    k = len(out) - 1
    parts.write_rows(out[:k], 0, len(acc))
    out[k] = acc
    gram = _gram(out.flatten(1), torch.float64)
    weights = coefficients(gram[:k, :k], gram[k, :k], advantages)
    return (weights @ out[:k].flatten(1)).view_as(acc)


def from_activations(parts, acc, advantages):
    """`<s_i, s_j>` is the sum over t, u of `<g_it, g_ju> <x_it, x_ju>`; no sequence gradient is formed."""
    left, right = parts.left.flatten(0, 1), parts.right.flatten(0, 1)
    k, length, _ = parts.left.shape
    gram = ((left @ left.mT).mul_(right @ right.mT)).view(k, length, k, length).sum((1, 3))
    overlaps = ((right @ acc.mT).mul_(left)).view(k, -1).sum(1)
    return parts.combine(coefficients(gram, overlaps, advantages))


def chunks(arguments):
    for rows, columns in arguments.shapes:
        for length in arguments.lengths:
            layer = make_layer(arguments, rows, columns, length)
            k, row_bytes = arguments.sequences, 4 * arguments.sequences * columns
            out = torch.empty(k, rows, columns)
            ways = {"whole": partial(own, *layer, out)}
            for kib in (8192, 2048):
                step = max(1, 1024 * kib // row_bytes)
                if step < rows:
                    chunk = torch.empty(k, step, columns)
                    ways[f"{kib} KiB kept"] = partial(own, *layer, out, step)
                    ways[f"{kib} KiB again"] = partial(own, *layer, chunk, step, True)
            reference = ways["whole"]()
            for function in ways.values():
                torch.testing.assert_close(function(), reference, rtol=1e-3, atol=1e-2)
            ways["ordinary gradient"] = partial(layer[0].combine, layer[2])
            for name, taken in zip(ways, turns(list(ways.values()), arguments.repeats), strict=True):
                yield {"shape": f"{rows}x{columns}", "T": length, "way": name} | taken


def augmented(arguments):
    for rows, columns in arguments.shapes:
        for length in arguments.lengths:
            layer = make_layer(arguments, rows, columns, length)
            out = torch.empty(arguments.sequences + 1, rows, columns)
            ways = [partial(own, *layer, out[:-1]), partial(with_acc, *layer, out)]
            torch.testing.assert_close(ways[1](), ways[0](), rtol=1e-3, atol=1e-2)
            for name, taken in zip(("own", "augmented"), turns(ways, arguments.repeats), strict=True):
                yield {"shape": f"{rows}x{columns}", "T": length, "way": name} | taken


def activations(arguments):
    for rows, columns in arguments.shapes:
        for length in sorted({8, 16, 32, 64, *arguments.lengths}):
            layer = make_layer(arguments, rows, columns, length)
            k, size = arguments.sequences, rows * columns
            out = torch.empty(k, rows, columns)
            ways = [partial(own, *layer, out), partial(from_activations, *layer)]
            torch.testing.assert_close(ways[1](), ways[0](), rtol=1e-3, atol=1e-2)
            flops = [
                2 * k * length * size + 2 * k * (k + 2) * size,
                4 * k * length * size + 2 * (k * length) ** 2 * (rows + columns),
            ]
            results = turns(ways, arguments.repeats)
            for name, count, taken in zip(("own", "activations"), flops, results, strict=True):
                yield {
                    "shape": f"{rows}x{columns}",
                    "T": length,
                    "way": name,
                    "gflop": count / 1e9,
                    "predicted": count / flops[0],
                } | taken


def solves(arguments):
    k = arguments.sequences
    for tensors in (11, 46, 310):  # of a layer of Qwen3, of the benchmark's model, of Qwen3-0.6B
        grads = torch.randn(tensors, k, 64, dtype=torch.float64)
        gram, overlaps, advantages = grads @ grads.mT, torch.randn(tensors, k).double(), torch.randn(k)
        ways = [
            lambda g=gram, b=overlaps, a=advantages: [coefficients(*one, a) for one in zip(g, b, strict=True)],
            partial(coefficients, gram, overlaps, advantages.expand(tensors, k)),
        ]
        for name, taken in zip(("one by one", "together"), turns(ways, arguments.repeats), strict=True):
            yield {"tensors": tensors, "way": name} | taken


def gathered(arguments):
    k = arguments.sequences
    for count, shape in ((9, (512,)), (8, (64,)), (28, (16, 576)), (28, (576, 16))):
        grads = [torch.randn(k, *shape).flatten(1) for _ in range(count)]
        accs, advantages = [torch.randn_like(g[0]) for g in grads], torch.randn(k)

        def one_by_one(grads=grads, accs=accs, advantages=advantages):
            return [
                coefficients(_gram(g, torch.float64), g @ acc, advantages) @ g
                for g, acc in zip(grads, accs, strict=True)
            ]

        def together(grads=grads, accs=accs, advantages=advantages):
            stacked, acc = torch.stack(grads), torch.stack(accs).unsqueeze(-1)
            overlaps = (stacked @ acc).squeeze(-1)
            weights = coefficients(stacked @ stacked.mT, overlaps, advantages.expand_as(overlaps))
            return (weights.unsqueeze(1) @ stacked).squeeze(1)

        torch.testing.assert_close(together(), torch.stack(one_by_one()), rtol=1e-3, atol=1e-2)
        taken = turns([one_by_one, together], arguments.repeats)
        for name, result in zip(("one by one", "together"), taken, strict=True):
            yield {"tensors": f"{count} of {'x'.join(map(str, shape))}", "way": name} | result


def shares(arguments):
    emission = ProjectedAccumulation._emission
    seconds = {}

    def timed(self, microbatch, leaf, param):
        start = time.perf_counter()
        result = emission(self, microbatch, leaf, param)
        seconds[param.numel() <= SMALL] += time.perf_counter() - start
        return result

    ProjectedAccumulation._emission = timed
    for lora in (None, 16):
        for length in arguments.lengths:
            trainer, microbatches = make_steps(arguments, length, lora=lora)
            for repeats in (1, 3):  # the first step warms up
                seconds.update({True: 0.0, False: 0.0})
                total = sum(step_time.step(trainer, microbatches, "cpu")[0] for _ in range(repeats))
            small = [p.numel() <= SMALL for p in trainer.model.parameters() if p.requires_grad]
            for kind, name in ((True, "small"), (False, "large")):
                yield {
                    "trained": "LoRA" if lora else "all",
                    "T": length,
                    "tensors": f"{small.count(kind)} {name}",
                    "of a step": seconds[kind] / total,
                }
    ProjectedAccumulation._emission = emission


def make_steps(arguments, length, budget=PROMAConfig.projection_memory_budget, lora=None):
    """A trainer of the step-time benchmark's model, and the microbatches of a step."""
    defaults = step_time.make_parser().parse_args(["--prompt", "0.02", "--device", "cpu"])
    defaults.sequences, defaults.lora = arguments.sequences, lora
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_time.make_trainer(
            PROMATrainer, PROMAConfig, defaults, length, folder, projection_memory_budget=budget
        )
    return trainer, [step_time.make_inputs(defaults, length, seed) for seed in range(defaults.microbatches)]


def budgets(arguments):
    mib = (512, 32, 8, 2)
    for length in arguments.lengths:
        steps = [partial(step_time.step, *make_steps(arguments, length, budget / 1024), "cpu") for budget in mib]
        for budget, taken in zip(mib, turns(steps, min(5, arguments.repeats)), strict=True):
            yield {"T": length, "budget MiB": budget} | taken


def bfloat16(arguments):
    for rows, columns in arguments.shapes:
        for length in arguments.lengths:
            parts, acc, advantages = make_layer(arguments, rows, columns, length)
            grads = torch.bmm(parts.left.double().mT, parts.right.double()).flatten(1)
            acc = (acc * grads.std()).double().flatten() + grads.mean(0)  # overlaps that are not noise
            exact = coefficients64(grads, acc, advantages) @ grads
            policy = advantages.double() @ grads
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                # Products in float32: sums are float32's, and products of bfloat16 numbers exact
                rounded = torch.bmm(parts.left.mT, parts.right).to(dtype).float().flatten(1)
                gram, overlaps = _gram(rounded, torch.float64), rounded @ acc.float()
                weights = coefficients(gram, overlaps, advantages)
                yield {
                    "shape": f"{rows}x{columns}",
                    "T": length,
                    "way": name,
                    "coefficients": error(weights.double() @ grads, exact),
                    "emission": error((weights @ rounded).double(), exact),
                    "removal": error(weights.double() @ grads - policy, exact - policy),
                }


def coefficients64(grads, acc, advantages):
    """The same in float64 throughout."""
    k = len(grads)
    tolerance = rank_tolerance(k, torch.float64, torch.float64)
    return solve(grads @ grads.mT, grads @ acc, acc @ acc, advantages.double(), SETTINGS, tolerance).coefficients


def error(value, exact):
    """Relative error."""
    return ((value - exact).norm() / exact.norm()).item()


WAYS = {
    "chunks": chunks,
    "augmented": augmented,
    "activations": activations,
    "solves": solves,
    "gathered": gathered,
    "shares": shares,
    "bfloat16": bfloat16,
    "budgets": budgets,
}


def parse_shape(text):
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="way", help=f"any of {', '.join(WAYS)}; all without it")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=[(512, 512), (1536, 512), (1024, 3072)])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens a sequence, T")
    parser.add_argument("--sequences", type=int, default=8, help="sequences a microbatch, k")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = []
    for name in arguments.ways or WAYS:
        print(name)
        header = None
        for result in WAYS[name](arguments):
            if result.keys() != header:
                header = result.keys()
                print("".join(f"{key:>18}" for key in header))
            print("".join(f"{x:>18.3g}" if isinstance(x, float) else f"{x:>18}" for x in result.values()), flush=True)
            results.append({"weighed": name} | result)
    step_time.write(arguments, results)


if __name__ == "__main__":
    main()
