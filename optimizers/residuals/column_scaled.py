"""Alice's compensation: the gradient outside the subspace, each column divided by its usual size.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension" (arXiv 2502.07752). With R the projected gradient of a left projection (a right
one is the same on G^T), D = G - P R, and d the length of the projected axis:

    p_j <- b p_j + (1 - b) ||D_j||^2            by column j, no bias correction
    S = sqrt(d - r) D_j / sqrt(p_j),    its norm limited to grow by 1 % a step
    W <- W - lr scale (P N + compensation_scale S)

with lr without any bias correction. S has entries of about RMS 1. No m x n temporary is made: the
update is one back-projection and one multiply-add of G, and norms follow from those of the columns
of G and R. Where nearly all of a column lies in the subspace ||D_j||^2 is at least ||G_j||^2 times
the precision, so that rounding errors are not magnified. Memory: one fp32 number for each column,
whole on every process, and one for the limiter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.geometry import Geometry, Side
from ..projectors import ProjectedParam, Projector
from ..projectors.norms import (
    NORM_BYTES,
    axis_norms,
    gradient_norms,
    outside_norm,
    reconstructed_squares,
)
from ..rules import Update
from ..rules.growth import limit_growth
from .base import ScaledPart, WeightUpdate
from .limiter import STATE_KEY, LimitedResidual

MEANS = "residual_squares"


def _long(geometry: Geometry) -> int:
    """Length of the axis that is not projected."""
    return geometry.shape[1] if geometry.side is Side.LEFT else geometry.shape[0]


@dataclass(frozen=True)
class ColumnScaled(LimitedResidual):
    """Alice's residual with its norm-growth limiter.

    Attributes:
        compensation_scale: factor on the residual, besides `scale`.
        compensation_beta: b, decay of the squares by column.
    """

    ADVANCES: ClassVar[tuple[str, ...]] = (MEANS, STATE_KEY)
    OPTIONS: ClassVar[tuple[str, ...]] = ("compensation_scale", "compensation_beta", "limiter")

    compensation_scale: float = 0.4
    compensation_beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("compensation_scale", self.compensation_scale, low=0.0)
        beta = self.compensation_beta
        checks.number("compensation_beta", beta, low=0.0, high=1.0, high_open=True)

    def check(self, geometry: Geometry, projector: Projector) -> None:
        """Raises `ValueError` for a projection of both axes, which leaves no axis to scale by."""
        if geometry.side is Side.BOTH:
            raise ValueError(
                "proj_type='full' with residual='column_scaled': accepted is one projected axis, "
                "the squares belong to the other one"
            )

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Zero squares, and no norm yet."""
        size, wide = _long(geometry), wide_dtype(like)
        means = torch.zeros(size, dtype=wide, device=like.device)
        return {MEANS: means, **super().init(geometry, like)}

    def state_bytes(self, geometry: Geometry, itemsize: int, world: int = 1) -> int:
        """A number for each column, and the norm."""
        return max(itemsize, 4) * _long(geometry) + super().state_bytes(geometry, itemsize)

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Residual.step_traffic`: norms by column, or what each process has of them."""
        if geometry.side is Side.LEFT:
            return 8 * geometry.shape[1]
        wide = max(itemsize, 4)
        limited = 0 if self.limiter is None else 2 * wide + NORM_BYTES * wide // 4
        return -(-geometry.shape[0] // world) * wide + limited

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module; without host synchronisation on CUDA."""
        geometry = param.geometry
        axis = 0 if geometry.side is Side.LEFT else 1
        squares = gradient_norms(param, axis).square()
        inside = axis_norms(projected, axis).square()
        kept = reconstructed_squares(param, projected, inside, projector, axis, 1.0)
        floor = squares * torch.finfo(squares.dtype).eps
        means = self._averaged(param, torch.maximum(squares - 2 * inside + kept, floor), axis)
        free = math.sqrt(geometry.shape[axis] - geometry.rank)
        phi = torch.where(means > 0, means.rsqrt() * free, 0.0)
        if self.limiter is not None:
            norm = outside_norm(param, projected, projector, phi, squares, inside, kept, 1.0)
            phi = phi * limit_growth(param.state[STATE_KEY], norm, self.limiter)
        rate = update.alpha if update.rate is None else update.rate
        half = projected.dtype == torch.float16
        precision = torch.float32 if half else projected.dtype
        factors = (phi * (rate * self.scale * self.compensation_scale)).to(precision)
        direction = update.direction.to(precision) * (update.alpha * self.scale)
        direction = direction.addcmul_(projected.to(precision), factors, value=-1.0)
        return WeightUpdate(direction, 1.0, update.decay_factor, ScaledPart(factors, 1.0))

    def _averaged(self, param: ProjectedParam, squares: Tensor, axis: int) -> Tensor:
        """Advances the squares of what is here, and all processes' copies of them."""
        stored: Tensor = param.state[MEANS]
        own = squares.reshape(-1).to(stored.dtype)
        held = stored if axis == 0 else stored[param.rows.start : param.rows.stop]
        means = held.lerp(own, 1 - self.compensation_beta)
        stored.copy_(means if axis == 0 else param.rows.assemble(means))
        return means.view(squares.shape)
