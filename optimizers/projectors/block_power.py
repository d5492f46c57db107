"""LDAdam's projector: one block power iteration at each step, on gradient and momentum together.

Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics" (arXiv
2410.16103). With A the gradient (and what error feedback adds to it), P the former basis, M the
first moment after k steps:

    B = rho P M / (1 - b1^k) + (1 - rho) A,    P <- an orthonormal basis of B B^T P

(a right projection is the same on the transposes). The first basis are singular vectors of A. With
`update_proj_gap` above 1 the iteration is taken every so many steps only. It costs two products
with A and a QR factorisation. Memory: min(m, n) r for P.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.fp32 import exact_fp32
from ..engine.geometry import Side
from . import subspace
from .base import Bases, ProjectedParam
from .operand import Operand
from .singular import SingularProjector, align_signs

#: Keys in `ProjectedParam.scratch` of the basis and the first moment before a refit.
FORMER_BASIS, FORMER_MOMENT = "former_basis", "former_moment"


@dataclass(frozen=True)
class BlockPowerProjector(SingularProjector):
    """A basis that takes one power iteration when it is refitted.

    Attributes:
        rho: the momentum's share in what is iterated on, in [0, 1].
        beta1: decay of the first moment; `for_group` fills it in.
    """

    ONE_AXIS: ClassVar[str] = "block_power"
    OPTIONS: ClassVar[tuple[str, ...]] = ("refresh", "rho")

    rho: float = 0.908
    beta1: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("rho", self.rho, low=0.0, high=1.0)

    def for_group(self, group: Mapping[str, Any]) -> BlockPowerProjector:
        """With the group's decay of the first moment; 0, no bias correction, if it has none.

        Raises:
            ValueError: moments="reset", which would zero the moments at every step.
        """
        if group.get("moments") == "reset":
            raise ValueError(
                "moments='reset' with projector='block_power': accepted are 'keep', 'restore' and "
                "'rotate'; the subspace moves at every refresh by a little"
            )
        betas = group.get("betas")
        if betas is not None:
            checks.betas(betas)
        return replace(self, beta1=float(betas[0]) if betas else 0.0)

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Singular vectors at first, then as in the module; a zero gradient keeps its basis."""
        first = [param for param in params if not param.fitted]
        found = dict(zip(map(id, first), super().fit(first), strict=True))
        return [found[id(p)] if id(p) in found else self._refit(p) for p in params]

    def _refit(self, param: ProjectedParam) -> Bases | None:
        largest = float(param.largest_entry())
        if not 0.0 < largest < math.inf:
            return None
        old_dr, moment = self.bases(param)[0].clone(), param.first_moment()
        moment = None if moment is None else moment.clone()
        try:
            basis_dr = self._iterated(param, old_dr, moment)
        except subspace.NotConverged:
            warnings.warn(
                f"no decomposition of the gradient of {param.name or param.geometry.shape} "
                f"converged at step {param.steps_done}; its previous basis is kept and the refresh "
                "is tried again",
                stacklevel=2,
            )
            return None
        if moment is not None:
            param.scratch |= {FORMER_BASIS: old_dr, FORMER_MOMENT: moment}
        self.store(param, (basis_dr,))
        return (basis_dr,)

    @exact_fp32()
    def _iterated(self, param: ProjectedParam, old_dr: Tensor, moment: Tensor | None) -> Tensor:
        """The next basis; the moment is that of all rows and columns."""
        geometry, wide = param.geometry, wide_dtype(param.grad)
        operand = Operand(param.grad, 1.0, geometry.side, param.rows)
        times, transposed_times = operand.along(geometry.side)
        old_dr = old_dr.to(wide)
        share = 0.0 if moment is None else self.rho
        image_lr = transposed_times(old_dr).mul_(1 - share)  # B^T P
        mean_lr: Tensor | None = None
        if moment is not None:
            correction = 1.0 - self.beta1**param.steps_done if param.steps_done else 1.0
            lying = moment.mT if geometry.side is Side.LEFT else moment
            mean_lr = lying.to(wide) * (share / correction)
            image_lr += mean_lr @ (old_dr.mT @ old_dr)
        product_dr = times(image_lr).mul_(1 - share)
        if mean_lr is not None:
            product_dr += old_dr @ (mean_lr.mT @ image_lr)
        if not bool(product_dr.isfinite().all()):
            raise subspace.NotConverged("the product with the gradient is not finite")
        (basis_dr,) = subspace.orthonormal([product_dr])
        return align_signs(basis_dr, old_dr)
