"""Which family of devices a tensor belongs to, and with it the way that a step takes.

On a CPU matrices are worked on one by one, in pieces that stay in the cache, and what is found out
about a gradient may decide what is done next. On a GPU launches and waiting for results cost more
than arithmetic: matrices of a shape are worked on together, in large pieces, and nothing is read
back between refreshes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_GPUS = {"cuda"}
#: A GPU's memory where none is asked, see `assuming_memory`.
_assumed: int | None = None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor takes the way of GPUs."""
    return tensor.device.type in _GPUS


def capturing() -> bool:
    """Whether a CUDA graph is being captured, during which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 where there is no such GPU to ask, and of other devices."""
    if _assumed is not None:
        return _assumed
    return _memory(device) if device.type == "cuda" else 0


@cache
def _memory(device: torch.device) -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


@contextmanager
def assuming_memory(size: int | None) -> Iterator[None]:
    """Lets all GPUs have so many bytes, whichever there are; None leaves them as they are."""
    global _assumed
    former, _assumed = _assumed, size
    try:
        yield
    finally:
        _assumed = former


@contextmanager
def as_on_gpu(kind: str = "cpu") -> Iterator[None]:
    """Lets another kind of device ("cpu", "meta") take the way of GPUs, for tests of it."""
    added = {kind} - _GPUS
    _GPUS.update(added)
    try:
        yield
    finally:
        _GPUS.difference_update(added)
