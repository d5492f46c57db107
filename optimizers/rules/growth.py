"""Fira's bound on the growth of a norm from one step to the next (arXiv 2410.01623)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def limit_growth(stored: Tensor, norm: Tensor, limit: float) -> Tensor:
    """The factor that keeps a norm from growing by more than `limit` in one step.

    Args:
        stored: 0-d, the norm after the last step, 0 for none; updated in place.
        norm: 0-d, the norm before limiting.
        limit: largest growth, such as 1.01.

    Returns:
        0-d factor in (0, 1]; nothing is read back to the host.
    """
    largest = (stored + 1e-8).mul_(limit)
    factor = torch.where(stored > 0, (largest / norm).clamp_(max=1.0), 1.0)
    # Not the product, which is no number for a norm that overflowed.
    stored.copy_(torch.where(stored > 0, torch.minimum(norm, largest), norm))
    return factor


def limit_growth_together(stored: Sequence[Tensor], norms_b: Tensor, limit: float) -> Tensor:
    """`limit_growth` of B matrices: factors B x 1 x 1 for norms of that shape."""
    stored_b = torch.stack(list(stored)).view(-1, 1, 1)
    new_b = stored_b <= 0
    # limit (stored + 1e-8), in one launch
    largest_b = torch.rsub(stored_b, limit * 1e-8, alpha=-limit).masked_fill_(new_b, torch.inf)
    factors_b = (largest_b / norms_b).clamp_(max=1.0).masked_fill_(new_b, 1.0)
    kept_b = torch.minimum(norms_b, largest_b).to(stored_b.dtype)
    torch._foreach_copy_(list(stored), list(kept_b.view(-1).unbind(0)))
    return factors_b
