"""Fira's residual: the gradient outside the subspace, scaled as Adam scales it inside.

Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (arXiv
2410.01623). With R the projected gradient and N = M / (sqrt(V) + eps), for each column j of a left
projection (a right one is the same on G^T):

    phi_j = ||N_j|| / (||R_j|| + 1e-8),    S = phi o (G - beta P R)
    L = max(||S|| / (s + 1e-8), limit) / limit,    S <- S / L,    s <- ||S||
    W <- W - s_t (scale P N + S)

The released code has beta = scale, the paper beta = 1. No m x n temporary is made: the update is
one back-projection of scale N - beta phi o R / L and one multiply-add of G, and ||S|| follows from
the norms of G's and R's columns. Memory: one fp32 number a matrix, s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.geometry import Geometry, Side
from ..projectors import ProjectedParam, Projector
from ..projectors.norms import (
    NORM_BYTES,
    gradient_norms,
    gradient_norms_together,
    keeps_norms,
    outside_norm,
    reconstructed_squares,
)
from ..rules import Update
from .base import ScaledPart, WeightUpdate, apart
from .limiter import LimitedResidual, norms_together, update_norms


@dataclass(frozen=True)
class NormScaled(LimitedResidual):
    """Fira's residual with its norm-growth limiter.

    Attributes:
        residual_scale: beta, the factor on the reconstruction P R that is subtracted from G; None
            is `scale`, as in the released code, 1 is the paper's.
    """

    NORMS: ClassVar[bool] = True
    OPTIONS: ClassVar[tuple[str, ...]] = ("residual_scale", "limiter")

    residual_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_scale is not None:
            checks.number("residual_scale", self.residual_scale)

    def check(self, geometry: Geometry, projector: Projector) -> None:
        """Raises `ValueError` for a projection of both axes, which leaves no axis to scale by."""
        if geometry.side is Side.BOTH:
            raise ValueError(
                "proj_type='full' with residual='norm_scaled': accepted is one projected axis, the "
                "factors belong to the other one"
            )

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Residual.step_traffic`: the gradient's norms by column, or sums over rows.

        Where nearly all of a gradient lies in the subspace one number more is sent.
        """
        if self.limiter is None:
            return 0
        if geometry.side is Side.LEFT:
            return 8 * geometry.shape[1]
        wide = max(itemsize, 4)
        return 2 * wide + NORM_BYTES * wide // 4

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module; without host synchronisation on CUDA."""
        beta = self.scale if self.residual_scale is None else self.residual_scale
        axis = 0 if param.geometry.side is Side.LEFT else 1
        projected_norms, step_norms = update_norms(projected, update, axis)
        ratios = step_norms / (projected_norms + 1e-8)  # phi, times update.factor

        def norm(phi: Tensor) -> Tensor:
            squares, projected_squares = (
                gradient_norms(param, axis).square(),
                projected_norms.square(),
            )
            kept = reconstructed_squares(param, projected, projected_squares, projector, axis, beta)
            return outside_norm(
                param, projected, projector, phi, squares, projected_squares, kept, beta
            )

        # Where a gradient is small its factor is large: 1e8 and more, which fp16 doesn't hold.
        half = projected.dtype == torch.float16
        precision = torch.float32 if half else projected.dtype
        factors = self.limited(param, ratios, update, norm).to(precision)
        direction, alpha = update.direction, update.alpha
        if isinstance(alpha, Tensor):
            factors, direction, alpha = factors * alpha, direction * alpha, 1.0
        direction = torch.addcmul(
            direction.to(precision) * self.scale, projected.to(precision), factors, value=-beta
        )
        return WeightUpdate(
            direction, alpha, update.decay_factor, ScaledPart(factors, float(alpha))
        )

    def compute_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        update: Update,
        projector: Projector,
        good_b: Tensor | None = None,
    ) -> list[WeightUpdate]:
        """See `Residual.compute_together`: vectors of all matrices in one tensor."""
        beta = self.scale if self.residual_scale is None else self.residual_scale
        bases = projector.bases(params[0])
        half = projected_b.dtype == torch.float16
        if half or not self.scale or not keeps_norms(bases[0], projector, beta):
            return super().compute_together(params, projected_b, update, projector, good_b)
        axis = 0 if params[0].geometry.side is Side.LEFT else 1
        norms_b, step_norms_b = norms_together(projected_b, update, axis)
        ratios_b = step_norms_b / (norms_b + 1e-8)  # phi, times update.factor
        if self.limiter is not None:
            squares_b = gradient_norms_together(params, axis).square_()
            # As ||P R_j|| = ||R_j||; never below the rounding error, see `outside_norm`.
            outside_b = torch.addcmul(squares_b, norms_b, norms_b, value=beta * (beta - 2))
            floor_b = squares_b.mul_(torch.finfo(squares_b.dtype).eps)
            outside_b = torch.maximum(outside_b, floor_b).sqrt_().mul_(ratios_b)
            # A factor 0 leaves nothing of a norm that isn't finite.
            outside_b.nan_to_num_(nan=0.0, posinf=torch.inf)
            ratios_b = self.limited_together(params, ratios_b, update, outside_b, good_b)
        direction_b = update.direction.addcmul_(projected_b, ratios_b, value=-beta / self.scale)
        factors_b, alpha = ratios_b.mul_(update.alpha), update.alpha * self.scale
        if isinstance(alpha, Tensor):
            direction_b, alpha = direction_b.mul_(alpha), 1.0
        updates = apart(replace(update, direction=direction_b), len(params))
        parts = [ScaledPart(factors, 1.0, gated=True) for factors in factors_b.unbind(0)]
        return [
            WeightUpdate(own.direction, alpha, own.decay_factor, scaled)
            for own, scaled in zip(updates, parts, strict=True)
        ]
