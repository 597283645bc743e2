"""A CPU that passes for a GPU: tests run the branches for accelerators on it, with stand-ins for what it lacks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from proma_trl import devices

aten = torch.ops.aten

# What no CPU has: products of two factors in half precision, with float32 sums
_PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


def _wide(product: Callable) -> Callable:
    """`product` with `out_dtype`, from tensors that are cast to it first: the same up to the order of summation."""

    def multiply(*args, out=None, **kwargs):
        *tensors, dtype = args
        factors = tensors[-2:]
        if not factors[0].dtype == factors[1].dtype in (torch.bfloat16, torch.float16) or dtype != torch.float32:
            raise TypeError(f"`out_dtype={dtype}` is for two factors in half precision, got {factors[0].dtype}.")
        found = product(*(x.to(dtype) for x in tensors), **kwargs)
        return found if out is None else out.copy_(found)

    return multiply


@contextmanager
def wide_products() -> Iterator[None]:
    """Within the context, the CPU has the products with `out_dtype`."""
    # Kernels, not a mode of dispatch, which would slow every operation down
    with torch.library._scoped_library("aten", "IMPL") as library:
        for product in _PRODUCTS:
            for overload in (product.dtype, product.dtype_out):
                library.impl(overload.name(), _wide(product.default), "CPU")
        yield


class Waits(RuntimeError):
    """The host would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU, for a value or for a number of elements that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if (
            packet
            in (
                aten._local_scalar_dense,
                aten.nonzero,
                aten.masked_select,
                aten.equal,
                aten.is_nonzero,
                aten._unique,
                aten._unique2,
                aten.unique_dim,
                aten.unique_consecutive,
                aten.bincount,
            )
            or func is aten.repeat_interleave.Tensor
        ):
            raise Waits(str(func))
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                raise Waits(f"{func} with a mask")
        return func(*args, **(kwargs or {}))


class NoCopies(TorchFunctionMode):
    """Fails where values would be copied from device to host, or from memory of the host that is not pinned."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            raise Waits(str(func))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            raise Waits(f"{func} on a device")
        devices = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str | torch.device)]
        if func is torch.Tensor.to and devices and not kwargs.get("non_blocking"):
            raise Waits("a blocking copy")
        return func(*args, **kwargs)


@contextmanager
def accelerating() -> Iterator[None]:
    """Within the context, the CPU passes for a GPU of 16 GiB."""
    with pytest.MonkeyPatch.context() as patch, wide_products():
        patch.setattr(devices, "ACCELERATORS", {"cuda", "cpu"})
        patch.setattr(devices, "total_memory", lambda device: 2**34)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the context, whatever would make the host wait for a GPU is a [`Waits`]."""
    with NoWaiting(), NoCopies():
        yield
