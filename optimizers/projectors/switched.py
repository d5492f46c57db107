"""Alice's projector: the leading directions of tracked gradients, and random ones beside them.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension" (arXiv 2502.07752). With G of d x l (transposed for a right projection), U the
basis and s = U^T G; every `update_proj_gap` steps

    Q = b3 U C U^T + (1 - b3) G G^T                    (`tracking=False`, Alice-0: Q = G G^T)
    U' = the eigenvectors of Q in the span of Q U      (one subspace iteration)
    U <- [the leading k of U', r - k directions drawn uniformly from their complement]

k = `leading_share` r. At each step C <- b3 C + (1 - b3) s s^T, an r x r matrix. The first basis are
singular vectors of the first gradient, by `refresh`. Directions are drawn as a Gaussian matrix made
orthonormal, outside the leading ones. When U changes, C follows it, since it belongs to directions,
not to places: C <- T C T^T with T = U_new^T U_old. Nothing of d x d is made.

Memory: d r entries, and r^2 fp32 entries with tracking.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.fp32 import exact_fp32
from ..engine.geometry import Geometry, Side
from ..engine.seeds import draw_seed
from . import subspace
from .base import Bases, ProjectedParam
from .operand import Operand
from .random import gaussian
from .singular import SingularProjector, align_signs

COVARIANCE = "basis_covariance"


@dataclass(frozen=True)
class SwitchedProjector(SingularProjector):
    """A basis of leading and random directions.

    Attributes:
        leading_share: k / r, in [0, 1]; at least one direction is a leading one unless it is 0.
        tracking: average the projected gradients' covariance (Alice), or not (Alice-0).
        tracking_beta: b3, its decay at each step, and its share at a refresh.
    """

    ONE_AXIS: ClassVar[str] = "switched"
    OPTIONS: ClassVar[tuple[str, ...]] = ("refresh", "leading_share", "tracking", "tracking_beta")
    TRACKS: ClassVar[bool] = True

    leading_share: float = 0.3
    tracking: bool = True
    tracking_beta: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("leading_share", self.leading_share, low=0.0, high=1.0)
        checks.choice("tracking", self.tracking, (True, False))
        checks.number("tracking_beta", self.tracking_beta, low=0.0, high=1.0, high_open=True)

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """A zero basis, and a zero covariance with tracking."""
        state = super().init(geometry, like)
        if self.tracking:
            r = geometry.rank
            state[COVARIANCE] = torch.zeros(r, r, dtype=wide_dtype(like), device=like.device)
        return state

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """The basis and the covariance."""
        tracked = geometry.rank**2 * max(itemsize, 4) if self.tracking else 0
        return super().state_bytes(geometry, itemsize) + tracked

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Projector.step_traffic`: of rows that are spread the covariance is a sum."""
        if not self.tracking or geometry.side is Side.LEFT:
            return 0
        return geometry.rank**2 * max(itemsize, 4)

    def stored(self, param: ProjectedParam) -> list[Tensor]:
        """See `Projector.stored`: the covariance too, which follows the basis."""
        tracked = [param.state[COVARIANCE]] if self.tracking else []
        return [*super().stored(param), *tracked]

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Singular vectors at first, then as in the module; a zero gradient keeps its basis."""
        first = [param for param in params if not param.fitted]
        found = dict(zip(map(id, first), super().fit(first), strict=True))
        return [found[id(p)] if id(p) in found else self._refit(p) for p in params]

    def _refit(self, param: ProjectedParam) -> Bases | None:
        largest = float(param.largest_entry())
        if not 0.0 < largest < math.inf:
            return None
        try:
            basis_dr = self._switched(param)
        except subspace.NotConverged:
            warnings.warn(
                f"no decomposition of the gradient of {param.name or param.geometry.shape} "
                f"converged at step {param.steps_done}; its previous basis is kept and the refresh "
                "is tried again",
                stacklevel=2,
            )
            return None
        old_dr = self.bases(param)[0].to(basis_dr.dtype, copy=True)
        self.store(param, (basis_dr,))
        if self.tracking:
            covariance: Tensor = param.state[COVARIANCE]
            turn_rr = self.bases(param)[0].to(old_dr.dtype).mT @ old_dr
            covariance.copy_(turn_rr @ covariance.to(old_dr.dtype) @ turn_rr.mT)
        return (basis_dr,)

    @exact_fp32()
    def _switched(self, param: ProjectedParam) -> Tensor:
        """The next basis."""
        geometry, wide = param.geometry, wide_dtype(param.grad)
        old_dr = self.bases(param)[0].to(wide)
        operand = Operand(param.grad, 1.0, geometry.side, param.rows)
        times, transposed_times = operand.along(geometry.side)
        product_dr = times(transposed_times(old_dr))
        share = self.tracking_beta if self.tracking else 0.0
        if self.tracking:
            tracked_dr = old_dr @ param.state[COVARIANCE].to(wide)
            product_dr = product_dr.mul_(1 - share).add_(tracked_dr, alpha=share)
        if not bool(product_dr.isfinite().all()):
            raise subspace.NotConverged("the product with the gradient is not finite")
        (span_dr,) = subspace.orthonormal([product_dr])
        image_lr = transposed_times(span_dr)
        gram_rr = image_lr.mT @ image_lr
        if self.tracking:
            turn_rr = span_dr.mT @ old_dr
            tracked_rr = turn_rr @ param.state[COVARIANCE].to(wide) @ turn_rr.mT
            gram_rr = gram_rr.mul_(1 - share).add_(tracked_rr, alpha=share)
        _, vectors_rr = subspace.eigh(gram_rr)
        rank = geometry.rank
        leading = min(rank, max(round(self.leading_share * rank), 1 if self.leading_share else 0))
        top_dk = span_dr @ vectors_rr.flip(-1)[:, :leading]
        if leading == rank:
            return align_signs(top_dk, old_dr)
        seed = draw_seed(self.seed, param.seed_name, param.steps_done, "switch")
        drawn = gaussian((len(top_dk), rank - leading), seed, param.weight).to(wide)
        for _ in range(2):  # the second time for what rounding left
            drawn = drawn - top_dk @ (top_dk.mT @ drawn)
        (others,) = subspace.orthonormal([drawn])
        # All of them, so that the signs of the first basis, which a solver chooses, never matter.
        return align_signs(torch.cat([top_dk, others], 1), old_dr)

    @property
    def gates(self) -> bool:
        """See `Projector.gates`."""
        return True

    @exact_fp32()
    def track(self, param: ProjectedParam, projected: Tensor) -> None:
        """Advances the covariance; the basis stays."""
        if not self.tracking:
            return
        covariance: Tensor = param.state[COVARIANCE]
        wide = projected.to(covariance.dtype)
        if param.geometry.side is Side.LEFT:
            square_rr = wide @ wide.mT
        else:
            square_rr = param.rows.processes.sum(wide.mT @ wide)
        if param.good is not None:
            square_rr = torch.where(param.good, square_rr, covariance)
        covariance.lerp_(square_rr, 1 - self.tracking_beta)
