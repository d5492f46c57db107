"""Argument checks and conversion for compiled implementations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .groups import group_count
from .library import Library, library_for

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASK64 = (1 << 64) - 1


def usable(*tensors: Tensor | None) -> Library | None:
    """The library, if the tensors are contiguous, on one device and of supported types, or None."""
    given = [t for t in tensors if t is not None]
    library = library_for(given)
    if library is None:
        return None
    device = given[0].device
    for tensor in given:
        if tensor.device != device or not tensor.is_contiguous():
            return None
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return None
    return library


def expect(name: str, tensor: Tensor | None, count: int, dtype: torch.dtype | None = None) -> None:
    """Raises `ValueError` for a buffer that is too small for a kernel."""
    if tensor is None:
        return
    wanted = dtype or tensor.dtype
    if tensor.numel() != count or tensor.dtype != wanted:
        raise ValueError(
            f"{name} has {tensor.numel()} entries of {tensor.dtype}; it must have {count} of "
            f"{wanted}"
        )


def expect_groups(scales: Tensor, zeros: Tensor | None, numel: int, group_size: int) -> None:
    """Raises `ValueError` unless there is one scale (and zero point) a group."""
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        expect(name, tensor, group_count(numel, group_size), scales.dtype)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of its data."""
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of their data."""
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Integers that C reads as an array."""
    return (ctypes.c_int64 * len(values))(*values)


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have one dtype."""
    return len({tensor.dtype for tensor in tensors}) == 1


def dtype_code(tensor: Tensor | None) -> int:
    """Its dtype's code in core/common.h."""
    return 0 if tensor is None else DTYPES[tensor.dtype]
