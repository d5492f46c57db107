"""The sign of the back-projected update, as in Online Subspace Descent's Lion.

    W <- (1 - lr wd) W - lr sign(P N)    (N P^T for a right projection)

in row chunks, with no m x n temporary and no state. Only the sign of `scale` has an effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.chunks import row_chunks
from ..engine.geometry import RowRange
from ..projectors import ProjectedParam, Projector
from ..rules import Update
from .base import Residual, WeightUpdate


@dataclass(frozen=True)
class SignedBack(Residual):
    """Nothing outside the subspace is used; the step is the sign of the back-projected update."""

    READS_GRADIENT: ClassVar[bool] = False
    READS_PROJECTED: ClassVar[bool] = False
    GATES: ClassVar[bool] = True

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module."""
        sense = math.copysign(1.0, self.scale) if self.scale else 0.0

        def edit(weight_kn: Tensor, rows: RowRange) -> None:
            for span in row_chunks(weight_kn):
                part = rows.part(span)
                signs = torch.zeros_like(weight_kn[span])
                projector.write_back(
                    param, signs, part, update.direction, alpha=-sense, decay_factor=1.0
                )
                signs.sign_()
                if isinstance(update.alpha, Tensor):
                    weight_kn[span].sub_(signs.mul_(update.alpha))
                else:
                    weight_kn[span].add_(signs, alpha=-update.alpha)

        return WeightUpdate(None, update.alpha, update.decay_factor, edit=edit)
