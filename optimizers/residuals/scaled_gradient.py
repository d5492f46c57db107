"""APOLLO's update: the gradient itself, scaled as Adam scales it in the subspace.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (arXiv 2412.05270). With R the
projected gradient, N = M / (sqrt(V) + eps) and j an index of the axis that is not projected:

    channel:  phi_j = ||N_j|| / (||R_j|| + 1e-8)        tensor:  phi = ||N|| / (||R|| + 1e-8)
    S = sqrt(scale) phi o G, limited to a growth of 1 % a step (`limiter`) before the factor
    sqrt(scale) or, with `scale_front`, after it;    W <- W - s_t S

There is no back-projection. The factor is the square root of `scale`, as in the released package.
Memory: one fp32 number a matrix, the limiter's norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..engine import checks
from ..engine.geometry import Geometry, Side
from ..engine.processes import ALONE
from ..projectors import ProjectedParam, Projector
from ..projectors.norms import (
    NORM_BYTES,
    gradient_norms,
    gradient_norms_together,
    safe_norm,
    safe_norms,
    weighted_norm,
)
from ..rules import Update
from .base import ScaledPart, WeightUpdate, apart
from .limiter import LimitedResidual, norms_together, update_norms

SCALE_TYPES = ("channel", "tensor")


@dataclass(frozen=True)
class ScaledGradient(LimitedResidual):
    """The gradient scaled by channel or as a whole.

    Attributes:
        scale_type: "channel" or "tensor".
        scale_front: multiply by sqrt(scale) before the limiter.
    """

    NORMS: ClassVar[bool] = True
    BACK_PROJECTS: ClassVar[bool] = False
    OPTIONS: ClassVar[tuple[str, ...]] = ("scale_type", "scale_front", "limiter")

    scale_type: str = "channel"
    scale_front: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("scale", self.scale, low=0.0)
        checks.choice("scale_type", self.scale_type, SCALE_TYPES)
        checks.choice("scale_front", self.scale_front, (True, False))

    def check(self, geometry: Geometry, projector: Projector) -> None:
        """Raises `ValueError` for factors by channel where both axes are projected."""
        if geometry.side is Side.BOTH and self.scale_type == "channel":
            raise ValueError(
                "proj_type='full' with scale_type='channel': accepted is one projected axis, the "
                "channels belong to the other one"
            )

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Residual.step_traffic`: norms by column, or of what is spread by rows."""
        norm = NORM_BYTES * max(itemsize, 4) // 4
        tensor = 2 * norm if self.scale_type == "tensor" and geometry.side is Side.RIGHT else 0
        if self.limiter is None:
            return tensor
        return tensor + (8 * geometry.shape[1] if geometry.side is Side.LEFT else norm)

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module; without host synchronisation on CUDA."""
        axis = 0 if param.geometry.side is Side.LEFT else 1
        projected, steps = update_norms(projected, update, axis)
        if self.scale_type == "tensor":
            steps, projected = (
                safe_norm(norms, param.across).view(1, 1) for norms in (steps, projected)
            )
        ratios = steps / (projected + 1e-8)  # phi, times update.factor
        if self.scale_front:
            ratios = ratios * self.scale**0.5
        spread = ALONE if axis == 0 else param.rows.processes

        def norm(phi: Tensor) -> Tensor:
            return weighted_norm(gradient_norms(param, axis), phi, spread)

        ratios = self.limited(param, ratios, update, norm)
        if not self.scale_front:
            ratios = ratios * self.scale**0.5
        alpha = update.alpha
        if isinstance(alpha, Tensor):
            ratios, alpha = ratios * alpha, 1.0
        return WeightUpdate(None, alpha, update.decay_factor, ScaledPart(ratios, float(alpha)))

    def compute_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        update: Update,
        projector: Projector,
        good_b: Tensor | None = None,
    ) -> list[WeightUpdate]:
        """See `Residual.compute_together`: vectors of all matrices in one tensor."""
        axis = 0 if params[0].geometry.side is Side.LEFT else 1
        norms_b, step_norms_b = norms_together(projected_b, update, axis)
        if self.scale_type == "tensor":
            norms_b, step_norms_b = safe_norms(norms_b), safe_norms(step_norms_b)
        ratios_b = step_norms_b / (norms_b + 1e-8)  # phi, times update.factor
        if self.scale_front:
            ratios_b.mul_(self.scale**0.5)
        if self.limiter is not None:
            whole_b = gradient_norms_together(params, axis).mul_(ratios_b)
            # A factor 0 leaves nothing of a norm that isn't finite.
            whole_b.nan_to_num_(nan=0.0, posinf=math.inf)
            ratios_b = self.limited_together(params, ratios_b, update, whole_b, good_b)
        if not self.scale_front:
            ratios_b.mul_(self.scale**0.5)
        factors_b = ratios_b.mul_(update.alpha)
        return [
            WeightUpdate(None, 1.0, own.decay_factor, ScaledPart(factors, 1.0, gated=True))
            for own, factors in zip(apart(update, len(params)), factors_b.unbind(0), strict=True)
        ]
