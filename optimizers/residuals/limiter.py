"""Fira's norm-growth limiter, which APOLLO uses too."""

from __future__ import annotations

import torch
from torch import Tensor


def limit_growth(stored: Tensor, norm: Tensor, limit: float) -> Tensor:
    """The factor that keeps a norm from growing by more than `limit` in one step.

    Args:
        stored: 0-d, the norm after the last step, 0 for none; set to this step's, in place.
        norm: 0-d, the norm before limiting.
        limit: largest growth, such as 1.01.

    Returns:
        0-d factor in (0, 1]; nothing is read back to the host.
    """
    growth = (norm / (stored + 1e-8)).clamp_(min=limit).div_(limit)
    factor = torch.where(stored > 0, growth.reciprocal(), 1.0)
    stored.copy_(norm * factor)
    return factor
