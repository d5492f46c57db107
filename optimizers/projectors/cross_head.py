"""GaLore+'s projector: one basis shared by all heads of an attention matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.geometry import Geometry, RowRange, Side
from ..engine.rotation import Rotation
from ..engine.seeds import draw_seed
from .base import Bases, ProjectedParam
from .singular import SingularProjector


@dataclass(frozen=True)
class HeadGeometry(Geometry):
    """An m x n matrix as `heads` blocks of m / heads rows, each projected from the left.

    Attributes:
        heads: h; `rank` is that of one head, and the projected gradient is (h rank) x n.
    """

    heads: int = 1

    @property
    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """One basis of (m / h) x rank."""
        return {"basis": (self.shape[0] // self.heads, self.rank)}

    def projected_shape(self, local_rows: int | None = None) -> tuple[int, int]:
        """(h rank) x n."""
        return self.heads * self.rank, self.shape[1]


@dataclass(frozen=True)
class CrossHeadProjector(SingularProjector):
    """A basis of one head's gradient for all heads (GaLore+, arXiv 2412.19820).

    With G_1 ... G_h the blocks of m / h rows that belong to the heads of a query, key or value
    matrix: P holds the leading left singular vectors of one G_i, redrawn at each refresh, and
    R_j = P^T G_j for every head j. A decomposition is h^2 times cheaper than the whole matrix's.
    `rank` counts the rows of all heads together: each has rank // h, at least 1.

    Memory: (m / h) (rank / h) entries for P; moments as in GaLore.

    Attributes:
        heads: h, required; it must divide m.
        fit_on: "one" head, as in the paper, or "all": the leading left singular vectors of all
            heads' gradients side by side.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("refresh", "heads", "fit_on")
    SPREADS: ClassVar[bool] = False

    heads: int | None = None
    fit_on: str = "one"

    def __post_init__(self) -> None:
        if self.heads is None:
            raise ValueError(
                "heads=None with projector='cross_head': accepted is the number of attention heads"
            )
        checks.integer("heads", self.heads, low=1)
        checks.choice("fit_on", self.fit_on, ("one", "all"))

    def geometry(self, shape: Sequence[int], rank: int, proj_type: str) -> HeadGeometry:
        """See `Projector.geometry`.

        Raises:
            ValueError: the heads don't divide the rows, or the side isn't the heads' own.
        """
        rows, columns = shape
        assert self.heads is not None
        if rows % self.heads:
            raise ValueError(
                f"heads={self.heads} for a matrix of {rows} x {columns}: accepted is a divisor of "
                f"{rows}"
            )
        if proj_type not in ("std", "left"):
            raise ValueError(
                f"proj_type={proj_type!r} with projector='cross_head': accepted are 'std' and "
                "'left', heads share a basis of their rows"
            )
        own = max(1, min(rank // self.heads, rows // self.heads, columns))
        return HeadGeometry((rows, columns), Side.LEFT, own, self.heads)

    def _blocks(self, matrix_mn: Tensor) -> Tensor:
        assert self.heads is not None
        rows, columns = matrix_mn.shape
        return matrix_mn.reshape(self.heads, rows // self.heads, columns)

    def matrix(self, param: ProjectedParam) -> tuple[Tensor, RowRange]:
        """The matrix to decompose: one head's rows, or all heads side by side."""
        blocks_hdn = self._blocks(param.grad)
        if self.fit_on == "all":
            chosen = blocks_hdn.transpose(0, 1).flatten(1)
        else:
            drawn = draw_seed(self.seed, param.seed_name, param.steps_done, "head")
            chosen = blocks_hdn[drawn % len(blocks_hdn)]
        return chosen, RowRange.whole(len(chosen))

    def project(self, param: ProjectedParam) -> Tensor:
        """(h rank) x n."""
        (basis_dr,) = self.bases(param)
        precision = self.dtype or param.grad.dtype
        blocks_hdn = self._blocks(param.grad)
        basis_rd = basis_dr.to(precision).mT
        if precision == param.grad.dtype:
            return (basis_rd @ blocks_hdn).flatten(0, 1)
        return torch.cat([(basis_rd @ b.to(precision)).to(param.grad.dtype) for b in blocks_hdn])

    def write_back(
        self,
        param: ProjectedParam,
        weight_kn: Tensor,
        rows: RowRange,
        direction: Tensor,
        *,
        alpha: float,
        decay_factor: float,
    ) -> None:
        """See `Projector.write_back`; head by head."""
        (basis_dr,) = self.bases(param)
        size, rank = basis_dr.shape
        basis_dr, direction = basis_dr.to(weight_kn.dtype), direction.to(weight_kn.dtype)
        for head in range(rows.start // size, -(-rows.stop // size)):
            start, stop = max(rows.start, head * size), min(rows.stop, (head + 1) * size)
            weight_kn[start - rows.start : stop - rows.start].addmm_(
                basis_dr[start - head * size : stop - head * size],
                direction[head * rank : (head + 1) * rank],
                beta=decay_factor,
                alpha=-alpha,
            )

    def rotation(self, param: ProjectedParam, previous: Bases) -> Rotation:
        """The same r x r rotation in every head."""
        inner = super().rotation(param, previous).left
        assert inner is not None
        return Rotation(left=torch.kron(torch.eye(self.heads or 1).to(inner), inner), right=None)
