"""What differs between devices. Nothing else in the package asks for the type of a device."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

# Types of devices that accelerate. Tests and the model of step times add "cpu" to run those branches without a GPU.
ACCELERATORS = {"cuda"}

# Types of devices that Triton makes kernels for, where TRL 1.15 runs
_TRITON = ("cuda", "xpu")


def accelerates(device: torch.device) -> bool:
    """
    Whether a device is a GPU: it sums products of half-precision matrices in float32 (`out_dtype`), keeps freed memory
    at hand, and runs kernels while the host goes on, so that the host must not wait for a number.
    """
    return device.type in ACCELERATORS


def default_memory_budget(device: torch.device) -> float:
    """
    GiB that the sequence gradients of one parameter may take. Half a GiB on a CPU, where working on a vocabulary in
    parts costs little. On a GPU an eighth of its memory: making the logits again costs much there. That is 10 GiB of
    80, which hold a head of 151,936 x 1,024 with 8 sequences in bfloat16 (2.6 GiB), as 3 of 24 do; and it is a quarter
    of what float32 weights, their gradients and AdamW's moments may take if as much again is left for activations.
    """
    return total_memory(device) / 8 / 2**30 if accelerates(device) else 0.5


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


def random_states(device: torch.device) -> list[torch.Tensor]:
    """States of the random number generators that a module on a device draws from."""
    states = [torch.get_rng_state()]
    if accelerates(device):
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Undo what was drawn since `random_states` returned `states`."""
    torch.set_rng_state(states[0])
    if accelerates(device):
        torch.cuda.set_rng_state(states[1], device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in the CPU's memory on another device, without waiting for it."""
    if accelerates(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype that a device knows."""
    return torch.float32 if device.type == "mps" else torch.float64


def runs_triton(device: torch.device) -> bool:
    """Whether TRL 1.15, whose fused head is in Triton alone, works on a device."""
    return device.type in _TRITON


def fork_random_numbers(device: torch.device) -> AbstractContextManager:
    """Within the context, random numbers may be drawn on the CPU and a device that later ones don't depend on."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
