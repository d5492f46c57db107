"""The sign of the back-projected update, as Online Subspace Descent's Lion takes it.

    W <- keep W - lr sign(up(N))

in row chunks, with no m x n temporary and no memory. The scale of the back-projection has no effect
but for its own sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.geometry import RowRange
from ..projectors import Projector, Slot
from ..projectors.norms import CHUNK_ELEMENTS
from ..rules import Update
from .base import Residual, Write


@dataclass(frozen=True)
class SignedBack(Residual):
    """Nothing outside the subspace is used, and the step is its update's sign in full space."""

    def plan(self, slot: Slot, low: Tensor, update: Update, projector: Projector) -> Write:
        """See the module."""
        sense = math.copysign(1.0, self.scale) if self.scale else 0.0

        def edit(weight_kn: Tensor, rows: RowRange) -> None:
            for part in rows.chunks(weight_kn.shape[1], CHUNK_ELEMENTS):
                start, stop = part.start - rows.start, part.stop - rows.start
                signs = torch.zeros_like(weight_kn[start:stop])
                projector.write_back(slot, signs, part, update.delta, alpha=-sense, keep=1.0)
                signs.sign_()
                if isinstance(update.alpha, Tensor):
                    weight_kn[start:stop].sub_(signs.mul_(update.alpha))
                else:
                    weight_kn[start:stop].add_(signs, alpha=-update.alpha)

        return Write(None, update.alpha, update.keep, edit=edit)
