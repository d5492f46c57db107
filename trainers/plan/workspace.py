"""Memory that kernels allocate for themselves, which no operation returns.

As measured with torch 2.13: decompositions on a CPU copy their input or ask LAPACK for its work
space; sums in a wider type copy what they sum, which GPUs convert as they read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _eigh(a: Tensor, *_: Any, **__: Any) -> int:
    n = a.shape[-1]
    # syevd's: reals and integers, of one matrix of the batch at a time
    return (2 * n * n + 6 * n + 1) * a.element_size() + 4 * (5 * n + 3)


def _copy(a: Tensor, *_: Any, **__: Any) -> int:
    return a.numel() * a.element_size()


def _reflectors(a: Tensor, *_: Any, **__: Any) -> int:
    return (a.numel() // a.shape[-2] * 65) * a.element_size() if a.dim() > 1 else 0


def _widened(a: Tensor, *_: Any, **kwargs: Any) -> int:
    dtype = kwargs.get("dtype")
    if dtype is None or dtype == a.dtype or a.device.type != "cpu":
        return 0
    return a.numel() * int(dtype.itemsize)


def _widened_list(tensors: list[Tensor], *_: Any, **kwargs: Any) -> int:
    return max((_widened(a, **kwargs) for a in tensors), default=0)


_KNOWN: dict[Any, Callable[..., int]] = {
    _aten._linalg_eigh.default: _eigh,
    _aten._linalg_eigh.eigenvalues: _eigh,  # in the place of its input
    _aten._linalg_svd.default: _copy,
    _aten.linalg_qr.default: _reflectors,
    _aten._linalg_solve_ex.default: _copy,
    _aten.linalg_inv_ex.default: _copy,
    _aten.logsumexp.default: _copy,
    _aten.sum.default: _widened,
    _aten.sum.dim_IntList: _widened,
    _aten._foreach_norm.Scalar: _widened_list,
}


def workspace_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes that an operation holds beside its results while it runs; 0 for most."""
    known = _KNOWN.get(func)
    return 0 if known is None else known(*args, **kwargs)
