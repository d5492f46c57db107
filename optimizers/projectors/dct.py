"""Cosine bases: the r columns of the discrete cosine transform in which most of the gradient lies.

"Trion" and "DCT-AdamW" (arXiv 2505.17967). The DCT of the projected axis, orthogonal and the same
for every matrix of a size, takes the place of singular vectors:

    Q_ik = sqrt(2 / d) cos(pi (2 i + 1) k / (2 d)),  column 0 divided by sqrt(2)
    P = the r columns of Q with the largest ||(Q^T G)_k||_1    (G Q on the right)

A refresh is one product with Q, made r columns at a time, without a decomposition; its cost doesn't
depend on the rank. Columns that stay chosen keep their place, so that moments that are kept belong
to the frequency that they averaged. Between refreshes P is made from its r frequencies whenever it
is read. Memory: 4 r bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from ..engine.geometry import Geometry, Side
from ..storage.base import DenseBasis
from .base import Bases, ProjectedParam, Projector

INDEX_BYTES = 4
INDEX = "_index"  # suffix of the key of the basis that the frequencies represent


def cosines(size: int, index_k: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of the orthogonal DCT-II of a size, d x k.

    Args:
        size: d.
        index_k: the frequencies, integers in [0, d).
        dtype: fp32 or fp64.
    """
    frequency_k = index_k.long()
    positions_d1 = torch.arange(size, device=index_k.device).unsqueeze(1)
    # Reduced as integers: the cosine of a large fp32 angle is inaccurate.
    steps_dk = (2 * positions_d1 + 1).mul(frequency_k).remainder_(4 * size)
    basis_dk = steps_dk.to(dtype).mul_(math.pi / (2 * size)).cos_().mul_(math.sqrt(2 / size))
    return basis_dk.mul_(torch.where(frequency_k == 0, math.sqrt(0.5), 1.0).to(dtype))


def choose(sums_d: Tensor, rank: int, previous_r: Tensor | None) -> Tensor:
    """The positions of the r largest numbers; those that were chosen before keep their place."""
    chosen_d = torch.zeros_like(sums_d, dtype=torch.bool)
    chosen_d[sums_d.topk(rank).indices] = True
    if previous_r is None:
        return chosen_d.nonzero().squeeze(1)
    stays_r = chosen_d[previous_r.long()]
    chosen_d[previous_r.long()] = False
    result_r = previous_r.long().clone()
    result_r[~stays_r] = chosen_d.nonzero().squeeze(1)
    return result_r


@dataclass(frozen=True)
class DCTProjector(Projector):
    """The subspace of r cosines of the projected axis, or of both axes."""

    def __post_init__(self) -> None:
        if self.storage != DenseBasis():
            raise ValueError("basis with projector='dct': accepted is None; frequencies are stored")

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Zero frequencies, to be chosen at the first fit."""
        return {
            key + INDEX: torch.zeros(rank, dtype=torch.int32, device=like.device)
            for key, (_, rank) in geometry.basis_shapes.items()
        }

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes of the frequencies."""
        return INDEX_BYTES * sum(rank for _, rank in geometry.basis_shapes.values())

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Chooses frequencies; a matrix with a zero or non-finite gradient keeps its own."""
        fitted: list[Bases | None] = []
        for param in params:
            largest = float(param.largest_entry())
            if not 0.0 < largest < math.inf:
                fitted.append(None)
                continue
            sides = [Side.LEFT, Side.RIGHT]
            if param.geometry.side is not Side.BOTH:
                sides = [param.geometry.side]
            for side, (key, (size, rank)) in zip(
                sides, param.geometry.basis_shapes.items(), strict=True
            ):
                index: Tensor = param.state[key + INDEX]
                sums_d = self._sums(param, side, size, rank)
                index.copy_(choose(sums_d, rank, index if param.fitted else None))
            param.read = None
            fitted.append(self.bases(param))
        return fitted

    def _sums(self, param: ProjectedParam, side: Side, size: int, rank: int) -> Tensor:
        """Sums of absolute values of each row of Q^T G (left), or column of G Q (right)."""
        grad, rows = param.grad, param.rows
        wide = wide_dtype(grad)
        sums_d = torch.zeros(size, dtype=wide, device=grad.device)
        for start in range(0, size, rank):
            index_k = torch.arange(start, min(start + rank, size), device=grad.device)
            columns_dk = cosines(size, index_k, wide).to(grad.dtype)
            if side is Side.RIGHT:
                sums_d[index_k] = (grad @ columns_dk).abs().sum(0, dtype=wide)
                continue
            # A row of Q^T G is a sum over rows, of which each process adds up some columns.
            partial_kn = columns_dk[rows.start : rows.stop].mT @ grad
            sums_d[index_k] = rows.processes.scatter_columns(partial_kn).abs().sum(1, dtype=wide)
        return rows.processes.sum(sums_d)

    def _read(self, param: ProjectedParam) -> Bases:
        wide = wide_dtype(param.weight)
        return tuple(
            cosines(size, param.state[key + INDEX], wide)
            for key, (size, _) in param.geometry.basis_shapes.items()
        )

    def stored(self, param: ProjectedParam) -> list[Tensor]:
        """See `Projector.stored`: the frequencies."""
        return [param.state[key + INDEX] for key in param.geometry.basis_shapes]
