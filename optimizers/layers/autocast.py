"""The computing precision and input shape of factored layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's precision if enabled, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def on_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of (t, n) matrices to (..., n)."""
    y = function(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], y.shape[-1])
