"""The definition, one sequence at a time, one tensor at a time, in float64: what every path is held against."""

import copy
from collections.abc import Callable

import torch

# Relative to a tensor's longest sequence gradient, shorter ones are rounding noise in float64
NOISE = 1e-12


def remove(acc, sequences, policy, *, method="iterative", sweeps=2, bound=0.5, strength=1.0):
    """`acc - strength * bound(P(acc))` for flat vectors: `acc` (n,), `sequences` list of (n,), `policy` (n,)."""
    if method == "none":
        return acc
    lengths = [s.norm() for s in sequences]
    longest = max(lengths)
    units = [s / length for s, length in zip(sequences, lengths, strict=True) if length > NOISE * longest]
    if method == "exact":
        basis = []
        for u in units:  # Gram-Schmidt, twice for accuracy
            for _ in range(2):
                for q in basis:
                    u = u - (u @ q) * q
            if u.norm() > 1e-3:
                basis.append(u / u.norm())
        projection = sum(((acc @ q) * q for q in basis), torch.zeros_like(acc))
    else:
        rest = acc.clone()
        for _ in range(sweeps):
            for u in units:
                rest = rest - (rest @ u) * u
        projection = acc - rest
    length = projection.norm()
    if bound is not None and length > bound * policy.norm():
        projection = projection * (bound * policy.norm() / length)
    return acc - strength * projection


def accumulate(
    model: torch.nn.Module,
    microbatches: list[tuple[list[Callable], torch.Tensor]],
    weigh: Callable[[str, list[torch.Tensor], torch.Tensor], torch.Tensor] | None = None,
    as_it_is: bool = False,
    directions: list[list[Callable]] | None = None,
    **settings,
) -> dict[str, torch.Tensor]:
    """
    PROMA's accumulated gradients of a float64 copy of `model`.

    `microbatches` holds, for each, the k objectives (functions of the model that give a scalar) and the k advantages.
    With `as_it_is`, for a model that can't be copied, the gradients of single sequences are the model's own, and all
    that follows is in float64. `weigh` returns other coefficients, `(k,)`, from a tensor's name, its flat sequence
    gradients and the advantages. `directions` holds, for each microbatch, objectives whose gradients are projected
    off in the place of its own.
    """
    if not as_it_is:
        model = copy.deepcopy(model).double()
        if getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()  # tests are to show that it changes nothing
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(objectives: list[Callable]) -> list[list[torch.Tensor]]:
        found = (torch.autograd.grad(f(model), list(params.values()), allow_unused=True) for f in objectives)
        return [
            [
                torch.zeros_like(p).double() if g is None else g.double()
                for p, g in zip(params.values(), own, strict=True)
            ]
            for own in found
        ]

    accumulated = {}
    for number, (objectives, advantages) in enumerate(microbatches):
        grads = gradients(objectives)
        others = grads if directions is None else gradients(directions[number])
        for index, (name, param) in enumerate(params.items()):
            sequences = [g[index].flatten() for g in grads]
            coefficients = advantages.double()
            if weigh is not None:
                coefficients = weigh(name, sequences, coefficients)
            policy = sum(c * s for c, s in zip(coefficients, sequences, strict=True))
            if name in accumulated:
                off = [g[index].flatten() for g in others]
                acc = remove(accumulated[name].flatten(), off, policy, **settings)
                accumulated[name] = (acc + policy).view_as(param)
            else:
                accumulated[name] = policy.view_as(param).clone()
    return accumulated


class Isopo:
    """
    ISOPO's coefficients, for `weigh` of [`accumulate`], in the optimizer steps of a run.

    `end_step` comes after all microbatches, of all ranks, of a step.
    """

    def __init__(self, method: str, regularization: float = 1.0):
        self.method, self.regularization = method, regularization
        self.means: dict[str, float] = {}
        self.values: dict[str, list[float]] = {}

    def __call__(self, name: str, sequences: list[torch.Tensor], advantages: torch.Tensor) -> torch.Tensor:
        k = len(sequences)
        gram = torch.tensor([[float(s @ t) for t in sequences] for s in sequences], dtype=torch.float64)
        lengths = [float(gram[i, i]) for i in range(k)]
        total = sum(lengths)
        if self.method == "fisher" and total > 0:
            lengths = [sum(float(gram[i, j]) ** 2 for j in range(k)) / total for i in range(k)]
        own = sum(lengths) / k
        self.values.setdefault(name, []).append(own)
        ridge = self.regularization * (self.means.get(name) or own)
        if ridge == 0:
            return advantages
        if self.method == "natural":
            return ridge * torch.linalg.inv(gram + ridge * torch.eye(k)) @ advantages
        return torch.stack([a / (x / ridge + 1) ** 0.5 for a, x in zip(advantages, lengths, strict=True)])

    def end_step(self) -> None:
        """Moves the running means."""
        for name, values in self.values.items():
            new = sum(values) / len(values)
            kept = self.means.get(name)
            self.means[name] = 0.9 * kept + 0.1 * new if kept else new
        self.values.clear()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5):
    """
    Every tensor within `tolerance` of the expected one's norm. Tensors whose gradient is zero in exact arithmetic (the
    bias of keys, to which softmax is blind) must be rounding noise beside the others.
    """
    assert found.keys() == expected.keys()
    total = torch.stack([want.double().norm() for want in expected.values()]).norm()
    for name, want in expected.items():
        got = found[name]
        assert got is not None, f"{name}: no gradient"
        if want.double().norm() < 1e-9 * total:
            assert got.double().norm() < 1e-6 * total, f"{name}: must be zero"
            continue
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
