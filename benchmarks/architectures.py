"""
Which of transformers' causal language models train with PROMA, and whether their sequence gradients are right.

    python benchmarks/architectures.py
    python benchmarks/architectures.py --classes Qwen3ForCausalLM MambaForCausalLM --again
    python benchmarks/architectures.py --output results/architectures.json --docs docs/models.md

A tiny model of each class, with random weights, goes through two microbatches of three padded sequences. The gradients
of single sequences in `ProjectedAccumulation`, and what it leaves in the model's with the exact projection, are held
against the definition, which runs each sequence alone. The verdicts:

- rule: right, all layers by rules of their own
- general: right, some layers by the general rule, which runs them again one sequence at a time
- refused: an error says so before the first optimizer step
- wrong: a gradient is off by more than 1e-4 of its norm, without an error
- error: another exception
- not buildable: there is no tiny model, or it does not run by itself

Each class has a process of its own. Verdicts are kept in `runs/architectures` and found there again without `--again`.
"""

import argparse
import inspect
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.architectures import NotBuildable, class_names, tiny_causal_lm  # noqa: E402
from support.oracle import remove  # noqa: E402
from support.sequences import make_batch, objectives  # noqa: E402

import proma_trl  # noqa: E402
from proma_trl import PROMA, ProjectedAccumulation  # noqa: E402
from proma_trl.sequence_grads.rerun import RerunLayer  # noqa: E402

KEPT = ROOT / "runs" / "architectures"
VERDICTS = ("rule", "general", "refused", "wrong", "error", "not buildable")
K, TOLERANCE = 3, 1e-4
# Tensors with smaller gradients are measured by this part of the largest one: some are zero but for rounding
FLOOR = 1e-3
# Singular values of gradients of length one, between which rounding decides whether these are linearly dependent
UNCLEAR = (1e-9, 1e-2)

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = dict[str, torch.Tensor]


def judge(class_name: str) -> dict[str, Any]:
    """The verdict on a class, and what led to it."""
    try:
        model, batches, found = runnable(class_name)
    except NotBuildable as error:
        return {"verdict": "not buildable", "reason": first_line(error)}
    result = found | try_out(model, batches)
    unused = [param for param in model.parameters() if param.requires_grad and param.grad is None]
    if result["verdict"] == "refused" and unused:
        for param in unused:
            param.requires_grad_(False)
        result["unused_frozen"] = try_out(model, batches)
    return result


def runnable(class_name: str) -> tuple[torch.nn.Module, list[Batch], dict[str, Any]]:
    """
    A tiny model that has made a backward pass, so that gradients are there which the text reaches; its microbatches;
    and how they were made.

    Raises:
        NotBuildable: If no model runs to finite gradients.
    """
    reasons = []
    # Some attention is NaN in float64 where all of a position's keys are masked; some models have float32 inside
    for dtype, left_padding in ((torch.float64, True), (torch.float64, False), (torch.float32, True)):
        model = tiny_causal_lm(class_name, dtype).train()
        model.config.use_cache = False  # as TRL does
        batches = [make_batch(K, seed, left_padding) for seed in range(2)]
        try:
            objectives(model, *batches[0][:3]).sum().backward()
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        if all(param.grad is None or param.grad.isfinite().all() for param in model.parameters()):
            return model, batches, {"dtype": str(dtype).removeprefix("torch."), "left_padding": left_padding}
        reasons.append("gradients that are not finite")
    raise NotBuildable(reasons[0])


def try_out(model: torch.nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """The verdict on a model that runs."""
    kept = {param: param.grad for param in model.parameters()}
    model.zero_grad()
    try:
        accumulation = ProjectedAccumulation(model, PROMA(method="exact", bound=None), microbatch_size=K)
        general = {type(x.module).__name__ for x in accumulation._hooks._layers if isinstance(x, RerunLayer)}
        # As the trainer does before the first step
        ids, mask, weights, _ = batches[0]
        accumulation.check_sequences(lambda r, microbatch: (objectives(model, ids, mask, weights) * r).sum(), K)
        single = [[accumulated(accumulation, [(*batch[:3], one)]) for one in torch.eye(K)] for batch in batches]
        found = accumulated(accumulation, batches)
        accumulation.detach()
    except Exception as error:
        return failure(error, model)
    finally:
        for param, grad in kept.items():
            param.grad = grad
    alone = [[of_sequence(model, batch, i) for i in range(K)] for batch in batches]
    want = definition(alone, [batch[3] for batch in batches])
    pairs = [pair for one, other in zip(single, alone, strict=True) for pair in zip(one, other, strict=True)]
    error, name = max(furthest(*pair) for pair in [*pairs, (found, want)])
    verdict = "wrong" if error > TOLERANCE else "general" if general else "rule"
    return {"verdict": verdict, "general": sorted(general), "error": error, "furthest": name}


def accumulated(accumulation: ProjectedAccumulation, batches: list[Batch]) -> Gradients:
    """The gradients that `ProjectedAccumulation` leaves after some microbatches."""
    model = accumulation.model
    model.zero_grad()
    for ids, mask, weights, advantages in batches:
        with accumulation.capture():
            objective = objectives(model, ids, mask, weights)
        accumulation.loss(objective, advantages.to(objective.dtype)).backward()
    return gradients(model)


def of_sequence(model: torch.nn.Module, batch: Batch, i: int) -> Gradients:
    """The gradient of a microbatch's sequence i, which runs alone."""
    model.zero_grad()
    objectives(model, *(x[i : i + 1] for x in batch[:3])).sum().backward()
    return gradients(model)


def definition(alone: list[list[Gradients]], advantages: list[torch.Tensor]) -> Gradients:
    """
    The accumulated gradients by the definition, from those of the microbatches' sequences. Parameters are left out
    where the projection hangs on rounding.
    """
    total: Gradients = {}
    for name in alone[0][0]:
        accumulated = None
        for grads, weights in zip(alone, advantages, strict=True):
            sequences = [grad[name].flatten() for grad in grads]
            policy = sum(weight * sequence for weight, sequence in zip(weights.double(), sequences, strict=True))
            if accumulated is None:
                accumulated = policy
            elif is_clear(sequences):
                accumulated = remove(accumulated, sequences, policy, method="exact", bound=None) + policy
            else:
                break
        else:
            total[name] = accumulated.view_as(alone[0][0][name])
    return total


def is_clear(sequences: list[torch.Tensor]) -> bool:
    """Whether it does not hang on rounding how many of some gradients are independent."""
    units = torch.stack([torch.nn.functional.normalize(sequence, dim=0) for sequence in sequences])
    values = torch.linalg.svdvals(units)
    return not bool(((values > UNCLEAR[0]) & (values < UNCLEAR[1])).any())


def trainable(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """The parameters that are trained, by name."""
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)


def gradients(model: torch.nn.Module) -> Gradients:
    """Copies of a model's gradients in float64."""
    return {
        name: torch.zeros_like(param, dtype=torch.float64) if param.grad is None else param.grad.double().clone()
        for name, param in trainable(model)
    }


def furthest(found: Gradients, want: Gradients) -> tuple[float, str]:
    """The largest relative error of the parameters in `want`, and which one has it."""
    floor = FLOOR * max(grad.norm() for grad in want.values())
    errors = {name: float((found[name] - grad).norm() / max(grad.norm(), floor)) for name, grad in want.items()}
    return max((error if error == error else float("inf"), name) for name, error in errors.items())


def failure(error: Exception, model: torch.nn.Module) -> dict[str, Any]:
    """The verdict that an exception means, with the classes of the layers that it names."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised_in.is_relative_to(Path(proma_trl.__file__).parent)
    if not (ours and isinstance(error, (ValueError, RuntimeError))):
        kind = f"{type(error).__name__} in {raised_in.name}"
        return {"verdict": "error", "reason": f"{kind}: {first_line(error)}"}
    layers = dict.fromkeys(re.findall(r"^  - `.*?` \((\w+)\)", str(error), re.MULTILINE))
    owners = dict(model.named_modules(remove_duplicate=False))
    for name in re.findall(r"`([\w.]+)`", str(error)):
        module = owners.get(name) or owners.get(name.rpartition(".")[0]) if "." in name else None
        if module is not None:
            layers.setdefault(type(module).__name__)
    return {"verdict": "refused", "reason": reason(error), "layers": [*layers]}


def reason(error: Exception) -> str:
    """What an error of the package says, with the first layer that it lists."""
    lines = str(error).splitlines()
    listed = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    return listed[0] if listed else lines[0]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or all of a short one."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) < 200 else text[:200] + "…"


def work(class_name: str, path: Path) -> None:
    """Judge a class in this process, and keep the verdict."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    keep(path, class_name, judge(class_name))


def keep(path: Path, class_name: str, result: dict[str, Any]) -> None:
    """Write a verdict."""
    config_class = getattr(transformers, class_name).config_class
    path.write_text(json.dumps({"class": class_name, "model_type": config_class.model_type} | result, indent=2) + "\n")


def sweep(names: list[str], jobs: int, timeout: float) -> None:
    """Judge classes, each in a process of its own, so that none can end the sweep."""
    context = multiprocessing.get_context("fork")  # which has imported all that it needs
    waiting, running = list(reversed(names)), {}
    with tqdm(total=len(names), unit="class") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                process = context.Process(target=work, args=(name, path_of(name)))
                process.start()
                running[process] = name, time.monotonic() + timeout
                bar.set_postfix_str(name)
            wait([process.sentinel for process in running], timeout=1)
            for process in list(running):
                name, deadline = running[process]
                if process.is_alive() and time.monotonic() < deadline:
                    continue
                end(process, name, timeout)
                del running[process]
                bar.update()


def end(process: BaseProcess, name: str, timeout: float) -> None:
    """Reap a process, and say why if it has kept no verdict."""
    late = process.is_alive()
    if late:
        process.kill()
    process.join()
    if late:
        keep(path_of(name), name, {"verdict": "error", "reason": f"no verdict within {timeout:g} s"})
    elif not path_of(name).exists():
        keep(path_of(name), name, {"verdict": "error", "reason": f"its process ended with {process.exitcode}"})


def path_of(class_name: str) -> Path:
    """Where a class's verdict is kept."""
    return KEPT / f"{class_name}.json"


def page(results: list[dict[str, Any]]) -> str:
    """The results as a page of the documentation."""
    counts = Counter(result["verdict"] for result in results)
    meaning = dict(re.findall(r"^- ([a-z ]+): (.+)$", inspect.getdoc(sys.modules[__name__]), re.MULTILINE))
    lines = [
        "# Which models train",
        "",
        f"The {len(results)} causal language models of transformers {transformers.__version__}, with the "
        f"accumulation-based variant and {K} sequences a microbatch: tiny models with random weights, whose gradients "
        "of single sequences are held against the definition. With one sequence a microbatch, a parameter's gradient "
        "is that of the sequence; Intra-PROMA alone needs none. For a model of your own: `python -m proma_trl.check "
        "MODEL`.",
        "",
        "```sh",
        "python benchmarks/architectures.py --again --output results/architectures.json --docs docs/models.md",
        "```",
        "",
        "| Verdict | Classes | Meaning |",
        "| --- | ---: | --- |",
        *(f"| {verdict} | {counts[verdict]} | {meaning[verdict].capitalize()}. |" for verdict in VERDICTS),
        "",
        "Left padding is that of TRL's prompts. A model that can't take it in float64 is compared without it, and one "
        "that can't run in float64, in float32. Images and sounds are in none of the microbatches.",
        "",
        "| Class | Model type | Verdict | Layers by the general rule, or the reason |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        detail = result.get("reason") or ", ".join(f"`{name}`" for name in result.get("general", []))
        if result["verdict"] == "wrong":
            detail = f"`{result['furthest']}` is off by {result['error']:.1e}"
        if "unused_frozen" in result:
            verdict = result["unused_frozen"]["verdict"]
            detail = f"{detail.rstrip('.')}. With the parameters frozen that text does not use: {verdict}."
        detail = detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{result['class']}` | {result['model_type']} | {result['verdict']} | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", default=class_names(), metavar="NAME", help="all without it")
    parser.add_argument("--again", action="store_true", help="judge classes that have a verdict already")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for a class")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--docs", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()

    KEPT.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        for name in arguments.classes:
            path_of(name).unlink(missing_ok=True)
    tqdm.monitor_interval = 0  # no thread beside those that fork
    sweep([name for name in arguments.classes if not path_of(name).exists()], arguments.jobs, arguments.timeout)

    results = [json.loads(path_of(name).read_text()) for name in arguments.classes]
    counts = Counter(result["verdict"] for result in results)
    for verdict in VERDICTS:
        print(f"{verdict:>14} {counts[verdict]:>4}")
    if arguments.output is not None:
        environment = {"torch": torch.__version__, "transformers": transformers.__version__}
        summary = {"environment": environment, "counts": {verdict: counts[verdict] for verdict in VERDICTS}}
        arguments.output.write_text(json.dumps(summary | {"results": results}, indent=2) + "\n")
    if arguments.docs is not None:
        arguments.docs.write_text(page(results))


if __name__ == "__main__":
    main()
