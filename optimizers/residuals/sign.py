"""FRUGAL's residual: a state-free step outside the subspace.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
Training" (arXiv 2411.07837). With R the projected gradient and lr without any bias correction:

    W <- W - lr scale inactive_lr_scale sign(G - P R)    or, "sgd", without the sign

(R P^T for a right projection) in row chunks, with no m x n temporary and no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..engine import checks
from ..engine.chunks import row_chunks
from ..engine.geometry import Geometry, RowRange, Side
from ..projectors import ProjectedParam, Projector
from ..rules import Update
from .base import Residual, RowEdit, WeightUpdate, apart

INACTIVE_UPDATES = ("sign", "sgd")


def complete(geometry: Geometry) -> bool:
    """Whether the subspace is the whole space, so that the residual is rounding error."""
    m, n = geometry.shape
    left, right = geometry.rank == m, geometry.rank == n
    if geometry.side is Side.BOTH:
        return left and right
    return left if geometry.side is Side.LEFT else right


@dataclass(frozen=True)
class SignResidual(Residual):
    """signSGD (or SGD) outside the subspace.

    Attributes:
        inactive_lr_scale: its learning rate as a multiple of the group's.
        inactive_update: "sign" or "sgd".
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("inactive_lr_scale", "inactive_update")

    GATES: ClassVar[bool] = True

    inactive_lr_scale: float = 1.0
    inactive_update: str = "sign"

    def __post_init__(self) -> None:
        checks.number("inactive_lr_scale", self.inactive_lr_scale, low=0.0)
        checks.choice("inactive_update", self.inactive_update, INACTIVE_UPDATES)

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module; without host synchronisation on CUDA."""
        rate = update.alpha if update.rate is None else update.rate
        size = rate * self.scale * self.inactive_lr_scale
        edit = self._edit(param, projected, size, projector)
        return WeightUpdate(
            update.direction, update.alpha * self.scale, update.decay_factor, edit=edit
        )

    def compute_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        update: Update,
        projector: Projector,
        good_b: Tensor | None = None,
    ) -> list[WeightUpdate]:
        """See `Residual.compute_together`."""
        made = super().compute_together(params, projected_b, update, projector)
        if good_b is None:
            return made
        rates = [own.alpha if own.rate is None else own.rate for own in apart(update, len(params))]
        factor, bad_b = self.scale * self.inactive_lr_scale, good_b.logical_not()
        whole = zip(params, projected_b.unbind(0), rates, bad_b.unbind(0), made, strict=True)
        return [
            replace(own, edit=self._edit(param, projected, rate * factor, projector, bad))
            for param, projected, rate, bad, own in whole
        ]

    def _edit(
        self,
        param: ProjectedParam,
        projected: Tensor,
        size: float | Tensor,
        projector: Projector,
        bad: Tensor | None = None,
    ) -> RowEdit | None:
        if complete(param.geometry):
            return None

        def edit(weight_kn: Tensor, rows: RowRange) -> None:
            first = param.rows.start
            for span in row_chunks(weight_kn):
                part = rows.part(span)
                held = slice(part.start - first, part.stop - first)
                outside = projector.outside(param, projected, held)
                if self.inactive_update == "sign":
                    outside.sign_()
                if bad is not None:
                    outside.masked_fill_(bad, 0.0)
                if isinstance(size, Tensor):
                    weight_kn[span].sub_(outside.mul_(size))
                else:
                    weight_kn[span].add_(outside, alpha=-size)

        return edit
