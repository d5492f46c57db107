"""The gradient outside the subspace as a step of normalised SGD, as SCALE takes it of the whole.

Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining" (arXiv 2506.16659) normalise a
hidden matrix's gradient by rows; here what a projection leaves of it. With R the projected
gradient, D = G - P R (R P^T for a right projection) and lr without any bias correction:

    W <- W - lr scale inactive_lr_scale D_ij / rms_j(D_ij)

in row chunks, with no m x n temporary and no state. Rows are the weight's, one for each output,
whichever axis is projected. A row of which only rounding errors are left outside the subspace is
left out, and so is a matrix whose subspace is the whole space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import row_chunks, wide_dtype
from ..engine.geometry import RowRange
from ..projectors import ProjectedParam, Projector
from ..rules import Update
from .base import Residual, WeightUpdate
from .sign import complete

#: Rounding errors of G - P R, in units of G's last place.
ROUNDING = 4.0


@dataclass(frozen=True)
class RowNormalised(Residual):
    """Normalised SGD outside the subspace.

    Attributes:
        inactive_lr_scale: its learning rate as a multiple of the group's.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("inactive_lr_scale",)
    GATES: ClassVar[bool] = True

    inactive_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        checks.number("inactive_lr_scale", self.inactive_lr_scale, low=0.0)

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module; without host synchronisation on CUDA."""
        return self._made(param, projected, update, projector, None)

    def compute_gated(
        self,
        param: ProjectedParam,
        projected: Tensor,
        update: Update,
        projector: Projector,
        good: Tensor,
    ) -> WeightUpdate:
        """See `Residual.compute_gated`: zeros are subtracted."""
        return self._made(param, projected, update, projector, good.logical_not())

    def _made(
        self,
        param: ProjectedParam,
        projected: Tensor,
        update: Update,
        projector: Projector,
        bad: Tensor | None,
    ) -> WeightUpdate:
        rate = update.alpha if update.rate is None else update.rate
        size = rate * self.scale * self.inactive_lr_scale
        alpha = update.alpha * self.scale
        if complete(param.geometry):
            return WeightUpdate(update.direction, alpha, update.decay_factor)
        factors = self._factors(param, projected, projector)
        first = param.rows.start

        def edit(weight_kn: Tensor, rows: RowRange) -> None:
            for span in row_chunks(weight_kn):
                part = rows.part(span)
                held = slice(part.start - first, part.stop - first)
                outside = projector.outside(param, projected, held).to(factors.dtype)
                outside.mul_(factors if len(factors) == 1 else factors[held])
                if bad is not None:
                    outside.masked_fill_(bad, 0.0)
                weight_kn[span] = (weight_kn[span].to(factors.dtype) - outside * size).to(
                    weight_kn.dtype
                )

        return WeightUpdate(update.direction, alpha, update.decay_factor, edit=edit)

    def _factors(self, param: ProjectedParam, projected: Tensor, projector: Projector) -> Tensor:
        """1 / RMS of each of the weight's rows outside the subspace; 0 for rounding errors."""
        # A matrix whose columns are spread over processes is seen as its transpose.
        axis = 0 if param.geometry.mirrored else 1
        wide = wide_dtype(param.grad)
        size = (1, param.grad.shape[1]) if axis == 0 else (len(param.grad), 1)
        squares = torch.zeros(2, *size, dtype=wide, device=param.grad.device)
        for span in row_chunks(param.grad):
            own = squares if axis == 0 else squares[:, span]
            outside = projector.outside(param, projected, span).to(wide)
            own[0] += outside.square_().sum(axis, keepdim=True)
            own[1] += param.grad[span].to(wide).square().sum(axis, keepdim=True)
        if axis == 0:
            squares = param.rows.processes.sum(squares)
        outside, whole = squares
        noise = whole * (ROUNDING * torch.finfo(param.grad.dtype).eps) ** 2
        factors = outside.div(param.geometry.shape[axis]).rsqrt_()
        return torch.where(outside > noise, factors, 0.0)
