"""Fira's norm-growth limiter, which APOLLO uses too."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.geometry import Geometry
from ..projectors import ProjectedParam
from ..projectors.norms import axis_norms, safe_norms
from ..rules import Update
from ..rules.growth import limit_growth as limit_growth
from ..rules.growth import limit_growth_together
from .base import Residual

STATE_KEY = "residual_norm"


def norms_together(projected_b: Tensor, update: Update, axis: int) -> tuple[Tensor, Tensor]:
    """`update_norms` of B matrices, in fp32 (fp64 for fp64)."""
    if update.norms is not None:
        return update.norms
    gradients, directions = (
        torch.linalg.vector_norm(t, dim=1 + axis, keepdim=True, dtype=wide_dtype(t))
        for t in (projected_b, update.direction)
    )
    return gradients, directions


def update_norms(projected: Tensor, update: Update, axis: int) -> tuple[Tensor, Tensor]:
    """Norms of the projected gradient and of `update.direction` along an axis, kept as length 1."""
    if update.norms is not None:
        return update.norms
    return axis_norms(projected, axis), axis_norms(update.direction, axis)


@dataclass(frozen=True)
class LimitedResidual(Residual, ABC):
    """A residual whose norm may grow by `limiter` in one step. Memory: one fp32 number a matrix.

    Attributes:
        limiter: largest growth of the norm, at least 1, or None for no limit.
    """

    GATES: ClassVar[bool] = True
    ADVANCES: ClassVar[tuple[str, ...]] = (STATE_KEY,)

    limiter: float | None = 1.01

    def __post_init__(self) -> None:
        if self.limiter is not None:
            checks.number("limiter", self.limiter, low=1.0)

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Zero: no norm yet."""
        if self.limiter is None:
            return {}
        return {STATE_KEY: torch.zeros((), dtype=torch.float32, device=like.device)}

    def state_bytes(self, geometry: Geometry, itemsize: int, world: int = 1) -> int:
        """One fp32 number with a limiter."""
        return 0 if self.limiter is None else 4

    def limited_together(
        self,
        params: Sequence[ProjectedParam],
        ratios_b: Tensor,
        update: Update,
        outside_b: Tensor,
        good_b: Tensor | None = None,
    ) -> Tensor:
        """`limited` of B matrices.

        Args:
            params: the matrices.
            ratios_b: B x 1 x n, B x m x 1 or B x 1 x 1, overwritten.
            update: of all.
            outside_b: the residual's norms with these ratios by index, B x ...
            good_b: flags on the device; the stored norms of others stay. Their ratios are 0.
        """
        if self.limiter is None:
            return ratios_b
        factor = update.factor
        if isinstance(factor, Tensor) or factor:
            norms_b = safe_norms(outside_b, divisor=factor)
        else:
            norms_b = outside_b.new_zeros(len(outside_b), 1, 1)
        stored = [param.state[STATE_KEY] for param in params]
        return ratios_b.mul_(limit_growth_together(stored, norms_b, self.limiter, good_b))

    def limited(
        self,
        param: ProjectedParam,
        ratios: Tensor,
        update: Update,
        norm: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Factors on the gradient, reduced so that the residual's norm grows at most by the limit.

        Args:
            param: the matrix, whose stored norm is advanced.
            ratios: factors that contain `update.factor`.
            update: the rule's update.
            norm: the residual's norm (0-d) as a function of the factors without `update.factor`,
                so that a change of that (a bias correction) doesn't count as growth.
        """
        if self.limiter is None:
            return ratios
        factor = update.factor
        nonzero = isinstance(factor, Tensor) or factor != 0.0
        phi = ratios / factor if nonzero else torch.zeros_like(ratios)
        return ratios * limit_growth(param.state[STATE_KEY], norm(phi), self.limiter)
