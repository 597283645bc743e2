"""Intra-PROMA's definition in float64, tensor by tensor: explicit inputs X, output gradients G and random matrices."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from proma_trl.intra.noise import SketchNoise, Tokens
from support import oracle


def noise(key: Sequence[int], name: str, dim: int, real: torch.Tensor, length: int) -> torch.Tensor:
    """The random numbers that the package gives real tokens, `(k, length, d)`: they are given to the definition."""
    places = torch.zeros(len(real), length, dtype=torch.long)
    for i in range(len(real)):
        count = 0
        for t in range(length):
            places[i, t] = count
            count += int(real[i, t])
    tokens = Tokens(places, torch.ones(*places.shape, 1), length)
    return SketchNoise(key, dim, len(real), torch.device("cpu"))(name, tokens, torch.float64)[..., :dim]


def dominant(rows: torch.Tensor, omega: torch.Tensor, iterations: int) -> torch.Tensor:
    """An orthonormal basis of the span of `Y = X^T omega`, after `iterations` times `Y = X^T (X Y)`."""
    sketch = rows.T @ omega
    for _ in range(iterations):
        basis, _ = torch.linalg.qr(sketch)  # the span of Y is all that counts
        sketch = rows.T @ (rows @ basis)
    left, singular, _ = torch.linalg.svd(sketch, full_matrices=False)
    return left[:, singular > 1e-9 * singular.max()] if singular.max() > 0 else left[:, :0]


def top(rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
    """
    The same by a singular value decomposition: the limit of many iterations, and the factor by which each iteration
    comes nearer to it.
    """
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    return right[:dim].T, float((singular[dim] / singular[dim - 1]) ** 2)


class Recorded:
    """Inputs and outputs of the linear layers of one forward pass, by the name of their weight."""

    def __init__(self, model: nn.Module, skipped: Sequence[str] = ()):
        self.inputs: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.outputs: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.transposed: set[str] = set()
        # Experts' place, tokens, inputs and outputs, by the name of their 3-D parameter
        self.experts: defaultdict[str, list[tuple]] = defaultdict(list)
        # Of the layers that read one tensor, the package takes the random matrix of the one that ran last
        self.last_reader: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []
        self._handles = []
        names = {param: name for name, param in model.named_parameters()}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear | Conv1D) and weight.requires_grad and names[weight] not in skipped:
                if isinstance(module, Conv1D):
                    self.transposed.add(names[weight])
                self._handles.append(module.register_forward_hook(self._hook(names[weight])))
            if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
                self._follow_experts(module, names)

    def _follow_experts(self, module: nn.Module, names: dict[nn.Parameter, str]) -> None:
        """Lets a mixture's experts run one after another."""
        up_name, down_name = names[module.gate_up_proj], names[module.down_proj]

        def linear(name, expert, rows, values):
            weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
            matrix = weight[expert].T if module.is_transposed else weight[expert]
            output = nn.functional.linear(values, matrix, None if bias is None else bias[expert])
            self.experts[names[weight]].append((expert, rows, values, output))
            return output

        def forward(hidden, index, routing):
            total = torch.zeros_like(hidden)
            for expert in range(module.num_experts):
                rows, choice = torch.where(index == expert)
                up = linear("gate_up_proj", expert, rows, hidden[rows])
                down = linear("down_proj", expert, rows, module._apply_gate(up))
                total = total.index_add(0, rows, down * routing[rows, choice].unsqueeze(-1))
            return total

        if module.is_transposed:
            self.transposed |= {up_name, down_name}
        module.forward = forward

    def _hook(self, name: str) -> Callable:
        def record(module, args, output):
            self._kept.append(args[0])
            self.inputs[name].append(args[0])
            self.outputs[name].append(output)
            self.last_reader[args[0].data_ptr()] = name

        return record

    def noise_name(self, name: str) -> str:
        """The name whose random matrix serves the inputs of a tensor."""
        return self.last_reader[self.inputs[name][0].data_ptr()] if len(self.inputs[name]) == 1 else name

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def accumulate(
    model: nn.Module,
    microbatches: list[tuple[Callable[[nn.Module], torch.Tensor], torch.Tensor, torch.Tensor]],
    *,
    dim: int,
    iterations: int = 1,
    strength: float = 1.0,
    target: str = "microbatch",
    seed: int = 0,
    rank: int = 0,
    step: int = 0,
    skipped: Sequence[str] = (),
    fused_head: str | None = None,
    factors: dict[str, float] | None = None,
    weigh: Callable | None = None,
    **settings,
) -> dict[str, torch.Tensor]:
    """
    Accumulated gradients of a float64 copy of `model`. A microbatch is a function that returns the k objectives, the k
    advantages, and the attention mask. `fused_head` names a head that does not run on the last token, `settings` are
    those of [`oracle.remove`]. With `factors`, subspaces are those of [`top`], and its factors are left there.
    """
    model = copy.deepcopy(model).double()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {"method": "none", **settings}
    accumulated = {}
    for index, (objectives, advantages, mask) in enumerate(microbatches):
        key = (seed, step, index, rank)
        recorded = Recorded(model, skipped)
        values = objectives(model)
        recorded.close()
        outputs = [output for of_weight in recorded.outputs.values() for output in of_weight]
        outputs += [output for uses in recorded.experts.values() for *_, output in uses]
        found = torch.autograd.grad(values.sum(), outputs, retain_graph=True, allow_unused=True)
        gradients = iter([torch.zeros_like(o) if g is None else g for o, g in zip(outputs, found, strict=True)])
        bases = {}
        for name, uses in recorded.outputs.items():
            xs, gs, omega_x, omega_g = [], [], [], []
            for use, (x, _) in enumerate(zip(recorded.inputs[name], uses, strict=True)):
                k, length = mask.shape
                x, g = x.detach().reshape(k, length, -1), next(gradients).reshape(k, length, -1)
                if name == fused_head:
                    length -= 1
                suffix = "" if use == 0 else f"#{use}"
                real = mask[:, :length] != 0
                xs.append(x[:, :length][real])
                gs.append(g[:, :length][real])
                assert not g[mask == 0].any()
                omega_x.append(noise(key, recorded.noise_name(name) + suffix, dim, mask, length)[real])
                omega_g.append(noise(key, name + suffix, dim, mask, length)[real])
            x, g = torch.cat(xs), torch.cat(gs)
            if factors is not None:
                (q_a, of_x), (q_g, of_g) = top(x, dim), top(g, dim)
                factors[name] = max(of_x, of_g)
            else:
                q_a = dominant(x, torch.cat(omega_x), iterations)
                q_g = dominant(g, torch.cat(omega_g), iterations)
            bases[name] = (q_a, q_g) if name in recorded.transposed else (q_g, q_a)
        for name, uses in recorded.experts.items():
            length = mask.shape[1]
            omega = noise(key, name, dim, mask, length).flatten(0, 1)
            bases[name] = {}
            for expert, rows, x, _ in uses:
                g, real = next(gradients), mask.flatten()[rows] != 0
                assert not g[~real].any()
                q_a = dominant(x.detach()[real], omega[rows][real], iterations)
                q_g = dominant(g[real], omega[rows][real], iterations)
                bases[name][expert] = (q_a, q_g) if name in recorded.transposed else (q_g, q_a)
        sequences = [
            torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True) for value in values
        ]
        for place, (name, param) in enumerate(params.items()):
            own = [torch.zeros_like(param) if s[place] is None else s[place] for s in sequences]
            coefficients = advantages.double()
            if weigh is not None:
                coefficients = weigh(name, [s.flatten() for s in own], coefficients)
            policy = sum(c * s for c, s in zip(coefficients, own, strict=True))

            def project(matrix, found=bases.get(name)):  # noqa: B008 - of this tensor
                if isinstance(found, dict):
                    return torch.stack([project(part, found[i]) for i, part in enumerate(matrix)])
                left, right = found
                return matrix - strength * left @ (left.T @ matrix @ right) @ right.T

            acc = accumulated.get(name)
            if name in bases and target == "microbatch":
                policy = project(policy)
            if name in bases and target == "accumulated" and acc is not None:
                acc = project(acc)
            if acc is not None:
                rest = oracle.remove(acc.flatten(), [s.flatten() for s in own], policy.flatten(), **settings)
                policy = rest.view_as(param) + policy
            accumulated[name] = policy.detach()
    return accumulated
