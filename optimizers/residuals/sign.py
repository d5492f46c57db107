"""FRUGAL's residual: a state-free step outside the subspace.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
Training" (arXiv 2411.07837). With R the projected gradient and lr without any bias correction:

    W <- W - lr scale inactive_lr_scale sign(G - P R)    or, "sgd", without the sign

(R P^T for a right projection) in row chunks, with no m x n temporary and no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..engine import checks
from ..engine.chunks import row_chunks
from ..engine.geometry import Geometry, RowRange, Side
from ..projectors import ProjectedParam, Projector
from ..projectors.base import RowsOutside
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
        edit = self._edit(param, size, partial(projector.outside, param, projected))
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
        updates = apart(update, len(params))
        edits: Sequence[RowEdit | None] = [None] * len(params)
        if not complete(params[0].geometry):
            factor = self.scale * self.inactive_lr_scale
            rates = [own.alpha if own.rate is None else own.rate for own in updates]
            outside = projector.outside_together(params, projected_b, good_b)
            edits = [
                self._edit(param, rate * factor, of)
                for param, rate, of in zip(params, rates, outside, strict=True)
            ]
        return [
            WeightUpdate(own.direction, own.alpha * self.scale, own.decay_factor, edit=edit)
            for own, edit in zip(updates, edits, strict=True)
        ]

    def _edit(
        self, param: ProjectedParam, size: float | Tensor, outside_of: RowsOutside
    ) -> RowEdit | None:
        if complete(param.geometry):
            return None

        def edit(weight_kn: Tensor, rows: RowRange) -> None:
            first = param.rows.start
            for span in row_chunks(weight_kn):
                part = rows.part(span)
                held = slice(part.start - first, part.stop - first)
                outside = outside_of(held)
                if self.inactive_update == "sign":
                    outside.sign_()
                if isinstance(size, Tensor):
                    weight_kn[span].sub_(outside.mul_(size))
                else:
                    weight_kn[span].add_(outside, alpha=-size)

        return edit
