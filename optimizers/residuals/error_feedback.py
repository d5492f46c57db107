"""LDAdam's error feedback: what a step loses is added to the next gradient.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics" (arXiv
2410.16103). With E the error, P_old and P the bases before and after a refit, M_old and M the first
moment in each of them:

    A = G + E takes the gradient's place: P is fitted to it and R = P^T A
    W <- W - s_t scale P N
    E <- A - P R + b1 / (1 - b1) (P_old M_old - P M)

The second part of E is what the moment loses as its subspace changes (with `moments="rotate"`). It
counts only where the projector reports it (`projector="block_power"`). Nothing is added to what a
step doesn't use: a gradient that isn't finite leaves E as it is.

Memory: m n entries of the weight's precision; no other temporary of this size is made. The released
code keeps them in the parameters' gradients, which then may neither be set to None nor clipped or
scaled; here gradients are the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.geometry import Geometry, Side
from ..engine.processes import chunk_range
from ..projectors import ProjectedParam, Projector, apply
from ..projectors.block_power import FORMER_BASIS, FORMER_MOMENT
from ..projectors.random import usable
from ..rules import Update
from .base import Residual, WeightUpdate

ERROR = "residual_error"


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """The gradient outside the subspace is kept for the next step.

    Attributes:
        beta1: decay of the first moment; `for_group` fills it in.
    """

    #: Of a gradient that isn't finite nothing is added to the error, and nothing is taken off it.
    GATES: ClassVar[bool] = True
    WHOLE: ClassVar[tuple[str, ...]] = (ERROR,)

    beta1: float = 0.0

    def for_group(self, group: Mapping[str, Any]) -> ErrorFeedback:
        """With the group's decay of the first moment."""
        betas = group.get("betas")
        if betas is not None:
            checks.betas(betas)
        return replace(self, beta1=float(betas[0]) if betas else 0.0)

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """No error yet."""
        return {ERROR: torch.zeros_like(like, memory_format=torch.contiguous_format)}

    def state_bytes(self, geometry: Geometry, itemsize: int, world: int = 1) -> int:
        """An entry for each of the weight's, of which each process has its rows'."""
        rows, columns = geometry.shape
        return len(chunk_range(rows, world, 0)) * columns * itemsize

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Residual.step_traffic`: whether the gradient is finite."""
        return 2 * itemsize

    def prepare(self, params: Sequence[ProjectedParam]) -> None:
        """Adds the gradients to the errors, which take their place; those not finite are left."""
        for param, sound in zip(params, usable(params), strict=True):
            if not sound:
                continue
            error: Tensor = param.state[ERROR]
            if error.dtype == torch.float16:  # whose range sums of gradients may leave
                error.nan_to_num_()
            param.grad = error.add_(param.grad)

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """See the module; the gradient is the error from here on."""
        error: Tensor = param.state[ERROR]
        if param.grad is error:
            self._advance(param, error, projected, projector)
        return WeightUpdate(update.direction, update.alpha * self.scale, update.decay_factor)

    def _advance(
        self, param: ProjectedParam, error: Tensor, projected: Tensor, projector: Projector
    ) -> None:
        lost = projected
        former, moment = (param.scratch.get(key) for key in (FORMER_BASIS, FORMER_MOMENT))
        if former is not None and moment is not None and self.beta1 < 1.0:
            weight = self.beta1 / (1.0 - self.beta1)
            if param.geometry.side is Side.RIGHT:
                moment = moment[param.rows.start : param.rows.stop]
            moment = moment.to(error.dtype)
            moved = projector.rotation(param, (former,))(moment)
            lost = projected + weight * moved
            apply.write_back(
                error, moment, (former,), param.geometry, param.rows, alpha=-weight, decay_factor=1
            )
        projector.write_back(param, error, param.rows, lost, alpha=1.0, decay_factor=1.0)
