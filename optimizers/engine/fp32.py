"""Matrix products in full fp32, whatever `torch.set_float32_matmul_precision` allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.RLock()
#: Number of open regions over all threads, and the settings to restore after the last.
_open = 0
_settings: tuple[str, ...] = ()


def _backends() -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn  # whose attributes are made at run time
    return torch.backends.cuda.matmul, mkldnn.matmul


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Context in which products of fp32 matrices use neither TF32 nor bf16, on GPUs or in oneDNN.

    TF32 keeps 10 bits of each factor: good enough for a gradient's projection, which is the user's
    choice (`torch.set_float32_matmul_precision`), but a basis from a Gram matrix, or Cholesky
    factors of one, would be orthonormal to 1e-3 instead of 1e-6. Also usable as a decorator.

    The setting belongs to the process: products of other threads are affected meanwhile. Regions
    may be nested and overlap in several threads; the last one to end restores what was set before
    the first. Only torch's newer settings (`fp32_precision`) are changed: the older ones warn in
    some versions, and read as before once the region has ended.
    """
    global _open, _settings
    with _LOCK:
        if _open == 0:
            _settings = tuple(backend.fp32_precision for backend in _backends())
            for backend, setting in zip(_backends(), _settings, strict=True):
                if setting not in ("ieee", "none"):
                    backend.fp32_precision = "ieee"
        _open += 1
    try:
        yield
    finally:
        with _LOCK:
            _open -= 1
            if _open == 0:
                for backend, setting in zip(_backends(), _settings, strict=True):
                    _restore(backend, setting)


def _restore(backend: Any, setting: str) -> None:
    """Restores a backend's precision; an inherited value stays inherited."""
    if setting in ("ieee", "none"):
        return
    backend.fp32_precision = "none"
    if backend.fp32_precision != setting:
        backend.fp32_precision = setting
