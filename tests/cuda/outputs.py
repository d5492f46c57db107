"""Outputs of operations: poisoned before, compared by their bits after."""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 64  # entries around an output that must stay


class Output:
    """A poisoned tensor inside a larger one."""

    def __init__(self, like: Tensor, offset: int) -> None:
        """Of the shape, type and device of `like`, `offset` entries after an aligned address."""
        self.start, self.count = MARGIN + offset, like.numel()
        poison = float("nan") if like.is_floating_point() else 0x5A
        self.whole = torch.full(
            (self.count + self.start + MARGIN,), poison, dtype=like.dtype, device=like.device
        )
        self.inside = self.whole[self.start : self.start + self.count].view(like.shape)

    def check_margins(self) -> None:
        """Raises unless the entries around it are as they were."""
        for margin in (self.whole[: self.start], self.whole[self.start + self.count :]):
            clean = margin.isnan() if margin.is_floating_point() else margin == 0x5A
            assert bool(clean.all())


def patterns(x: Tensor) -> Tensor:
    """The bits of each entry as integers; those of all NaN are the same."""
    if not x.is_floating_point():
        return x
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).contiguous().view(wide)
