"""Fira's residual: the gradient outside the subspace, scaled as Adam scales it inside.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (arXiv
2410.01623). With R the projected gradient and N = M / (sqrt(V) + eps), by index j of the long axis:

    phi_j = ||N_j|| / (||R_j|| + 1e-8),    S = phi o (G - beta up(R))
    L = max(||S|| / (s + 1e-8), limit) / limit,    S <- S / L,    s <- ||S||
    W <- W - s_t (scale up(N) + S)

The released code has beta = scale, the paper beta = 1. No m x n temporary is made: the update is
one back-projection of scale N - beta phi o R / L and one multiply-add of G, and ||S|| follows from
the norms of G's and R's columns. Memory: one fp32 number a matrix, s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..projectors import Geometry, Projector, RowRange, Side, Slot
from ..projectors.norms import axis_norms, kept_squares, outside_norm
from ..rules import Update
from .base import Residual, Write
from .limiter import limit_growth

STATE_KEY = "residual_norm"


@dataclass(frozen=True)
class NormScaled(Residual):
    """Fira's residual with its norm-growth limiter.

    Attributes:
        residual_scale: beta, the share of the reconstruction that is taken off the gradient; None
            is `scale`, as in the released code, 1 is the paper's.
        limiter: largest growth of ||S|| in one step, or None for no limit.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("residual_scale", "limiter")

    residual_scale: float | None = None
    limiter: float | None = 1.01

    def __post_init__(self) -> None:
        if self.residual_scale is not None:
            checks.number("residual_scale", self.residual_scale)
        if self.limiter is not None:
            checks.number("limiter", self.limiter, low=1.0)

    def check(self, geometry: Geometry, projector: Projector) -> None:
        """Raises `ValueError` for a projection of both axes, which leaves no axis to scale by."""
        if geometry.side is Side.BOTH:
            raise ValueError(
                "proj_type='full' with residual='norm_scaled': accepted is one projected axis, the "
                "factors belong to the other one"
            )

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Zero: no norm yet."""
        if self.limiter is None:
            return {}
        return {STATE_KEY: torch.zeros((), dtype=torch.float32, device=like.device)}

    def state_bytes(self, geometry: Geometry) -> int:
        """One fp32 number with a limiter."""
        return 0 if self.limiter is None else 4

    def plan(self, slot: Slot, low: Tensor, update: Update, projector: Projector) -> Write:
        """See the module; without host synchronisation on CUDA."""
        beta = self.scale if self.residual_scale is None else self.residual_scale
        axis = 0 if slot.geometry.side is Side.LEFT else 1
        low_norms = axis_norms(low, axis)
        ratios = axis_norms(update.delta, axis) / (low_norms + 1e-8)  # phi, times update.factor
        if self.limiter is not None:
            squares = axis_norms(slot.grad, axis).square()
            kept = kept_squares(slot, low, low_norms.square(), projector, axis)
            phi = ratios / update.factor if _nonzero(update.factor) else torch.zeros_like(ratios)
            norm = outside_norm(slot, low, projector, phi, squares, low_norms.square(), kept, beta)
            ratios = ratios * limit_growth(slot.state[STATE_KEY], norm, self.limiter)
        alpha = update.alpha
        delta, factors = update.delta, ratios.to(low.dtype)
        if isinstance(alpha, Tensor):
            factors, delta, alpha = factors * alpha, delta * alpha, 1.0
        delta = torch.addcmul(delta.to(low.dtype) * self.scale, low, factors, value=-beta)
        return Write(delta, alpha, update.keep, _multiply_add(slot, factors, float(alpha), axis))


def _nonzero(factor: float | Tensor) -> bool:
    return isinstance(factor, Tensor) or factor != 0.0


def _multiply_add(slot: Slot, factors: Tensor, alpha: float, axis: int) -> Any:
    def edit(weight_kn: Tensor, rows: RowRange) -> None:
        span = slice(rows.start - slot.rows.start, rows.stop - slot.rows.start)
        chunk = factors if axis == 0 else factors[span]
        weight_kn.addcmul_(slot.grad[span], chunk.to(weight_kn.dtype), value=-alpha)

    return edit
