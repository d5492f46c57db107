"""Which family of devices a tensor belongs to, and with it the way that a step takes.

On a CPU matrices are worked on one by one, in pieces that stay in the cache, and what is found out
about a gradient may decide what is done next. On a GPU launches and waiting for results cost more
than arithmetic: matrices of a shape are worked on together, in large pieces, and nothing is read
back between refreshes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_GPUS = {"cuda"}


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor takes the way of GPUs."""
    return tensor.device.type in _GPUS


def capturing() -> bool:
    """Whether a CUDA graph is being captured, during which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def as_on_gpu(kind: str = "cpu") -> Iterator[None]:
    """Lets another kind of device ("cpu", "meta") take the way of GPUs, for tests of it."""
    added = {kind} - _GPUS
    _GPUS.update(added)
    try:
        yield
    finally:
        _GPUS.difference_update(added)
