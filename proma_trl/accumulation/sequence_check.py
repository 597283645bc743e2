"""Checks that a model's sequence gradients are right: weighted and summed, they are an ordinary gradient."""

from collections.abc import Callable

import torch
from torch import nn

from ..sequence_grads.layer import ONE_SEQUENCE
from ..sequence_grads.probe import random_numbers_kept

Backward = Callable[[torch.Tensor], torch.dtype]


class WrongSequences(RuntimeError):
    """
    Some sequence gradients are wrong.

    Args:
        message (`str`): What to tell the user.
        names (`list[str]`): The parameters' names.
    """

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


def check_sequences(model: nn.Module, ordinary: Backward, captured: Backward, num_sequences: int) -> bool:
    """
    Compare the gradients of two losses that should be the same, for random weights of the sequences. A plain sum would
    not notice sequences that are mixed up.

    Args:
        model (`nn.Module`): Model with trainable parameters, whose gradients are left as they are.
        ordinary (`Callable`): From weights `(k,)`, makes an ordinary backward pass of the weighted loss.
        captured (`Callable`): The same with a backward pass that emits weighted sums of sequence gradients. Both
            return the lowest precision of their products.
        num_sequences (`int`): k.

    Returns:
        `bool`: Whether the ordinary gradient is finite, and so could be compared.

    Raises:
        WrongSequences: If gradients differ by more than rounding, with the parameters' names.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(params.values())).device
    generator = torch.Generator().manual_seed(0)
    signs = 1 - 2 * torch.randint(2, (num_sequences,), generator=generator)
    weights = (signs * (0.5 + torch.rand(num_sequences, generator=generator))).to(device)
    held = {name: param.grad for name, param in params.items()}

    def gradients(backward: Backward) -> tuple[dict[str, torch.Tensor], torch.dtype]:
        for param in params.values():
            param.grad = None
        # Both passes draw the same random numbers
        with random_numbers_kept(device):
            precision = backward(weights)
        return {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in params.items()}, precision

    try:
        want, _ = gradients(ordinary)
        if not torch.stack([grad.norm().to(device) for grad in want.values()]).isfinite().all():
            return False
        got, precision = gradients(captured)
    finally:
        for name, param in params.items():
            param.grad = held[name]
    wrong = _differing(got, want, precision)
    if wrong:
        shown = ", ".join(f"`{name}`" for name in wrong[:8]) + (f" and {len(wrong) - 8} more" if wrong[8:] else "")
        raise WrongSequences(
            f"The gradients of single sequences are wrong for {shown}: weighted and summed, they are not the gradient "
            "of the weighted sum. A layer mixes the sequences of a microbatch, or orders them in another way, or a "
            f"registered rule is wrong. Train with {ONE_SEQUENCE}, or freeze these parameters.",
            wrong,
        )
    return True


def _differing(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], precision: torch.dtype) -> list[str]:
    """Names of gradients that differ by more than rounding, which is large beside a gradient that should be zero."""
    relative, noise = (1e-3, 1e-5) if torch.finfo(precision).eps < 1e-6 else (0.1, 4e-3)
    norms = torch.stack([grad.norm() for grad in want.values()]).to("cpu", torch.float64)
    errors = torch.stack([(got[name] - grad).norm() for name, grad in want.items()]).to("cpu", torch.float64)
    bounds = relative * norms + noise * norms.max()
    return [name for name, bad in zip(want, (~(errors <= bounds)).tolist(), strict=True) if bad]
