"""Coordinate bases: r random rows or columns of the gradient (FRUGAL, arXiv 2411.07837).

Projection is a gather and back-projection a scatter, without a GEMM. The coordinates are redrawn
from (`seed`, the matrix's name, the step) at each refresh. Memory: 4 r bytes (sorted indices).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.geometry import Geometry, RowRange, Side
from ..engine.seeds import choose, draw_seed
from ..storage.base import DenseBasis
from .apply import largest_entry
from .base import Bases, ProjectedParam, Projector, RowsOutside
from .random import usable

INDEX_BYTES = 4
INDEX = "_index"  # suffix of the key of the basis that the indices represent


@dataclass(frozen=True)
class CoordinateProjector(Projector):
    """The subspace of r random coordinates of the projected axis, or of both axes."""

    FITS_GRADIENT: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.storage != DenseBasis():
            raise ValueError(
                "basis with projector='coordinate': accepted is None; indices are stored"
            )

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Zero indices, to be drawn at the first fit."""
        return {
            key + INDEX: torch.zeros(rank, dtype=torch.int32, device=like.device)
            for key, (_, rank) in geometry.basis_shapes.items()
        }

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes of the indices."""
        return INDEX_BYTES * sum(rank for _, rank in geometry.basis_shapes.values())

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Draws new indices; a matrix with a non-finite gradient keeps its previous ones."""
        fitted: list[Bases | None] = []
        for param, sound in zip(params, usable(params), strict=True):
            if not sound:
                fitted.append(None)
                continue
            for key, (size, rank) in param.geometry.basis_shapes.items():
                indices = param.state[key + INDEX]
                seed = draw_seed(self.seed, param.seed_name, param.steps_done, key)
                indices.copy_(choose(rank, size, seed, indices.device))
            param.read = None
            fitted.append(self.bases(param))
        return fitted

    def _read(self, param: ProjectedParam) -> Bases:
        """The indices as 0/1 matrices, for callers that need a dense basis."""
        bases = []
        for key, shape in param.geometry.basis_shapes.items():
            basis_dr = torch.zeros(shape, dtype=param.grad.dtype, device=param.grad.device)
            basis_dr.scatter_(0, param.state[key + INDEX].long()[None], 1.0)
            bases.append(basis_dr)
        return tuple(bases)

    def _indices(self, param: ProjectedParam) -> tuple[Tensor | None, Tensor | None]:
        """(of rows, of columns); None where that axis is not projected."""
        found = [param.state[key + INDEX] for key in param.geometry.basis_shapes]
        side = param.geometry.side
        return (
            None if side is Side.RIGHT else found[0],
            None if side is Side.LEFT else found[-1],
        )

    def project(self, param: ProjectedParam) -> Tensor:
        """The gradient's rows and columns; NaN throughout if any other entry is not finite."""
        rows, columns = self._indices(param)
        projected = param.grad
        if rows is not None and _all_rows(param.rows, param):
            projected = projected.index_select(0, rows)
        elif rows is not None:
            local, inside = _local(rows, param.rows.start, param.rows.stop)
            if not len(projected):
                projected = projected.new_zeros(1, projected.shape[1])
            projected = projected.index_select(0, local)
            projected = param.rows.processes.sum(projected.masked_fill_(~inside[:, None], 0.0))
        if columns is not None:
            projected = projected.index_select(1, columns)
        # Entries that are not selected must be checked too: adds 0 if all are finite, else NaN.
        return projected.add_(largest_entry(param.grad) * 0.0)

    def project_together(self, params: Sequence[ProjectedParam]) -> Tensor:
        """See `Projector.project_together`: gathers into one tensor."""
        first = params[0]
        known = any(param.projected is not None for param in params)
        if known or first.geometry.side is Side.BOTH or not _all_rows(first.rows, first):
            return super().project_together(params)
        projected_b = first.grad.new_empty(len(params), *first.geometry.projected_shape())
        largest_b = first.grad.new_empty(len(params))
        dim = 1 if first.geometry.side is Side.RIGHT else 0
        for param, out, largest in zip(
            params, projected_b.unbind(0), largest_b.unbind(0), strict=True
        ):
            (index,) = (param.state[key + INDEX] for key in param.geometry.basis_shapes)
            torch.index_select(param.grad, dim, index, out=out)
            torch.linalg.vector_norm(param.grad, torch.inf, out=largest)
        return projected_b.add_(largest_b.mul_(0.0).view(-1, 1, 1))

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
        """See `Projector.write_back`: a scatter."""
        if decay_factor != 1.0:
            weight_kn.mul_(decay_factor)
        picked, columns = self._indices(param)
        direction = direction.to(weight_kn.dtype)
        if picked is None:
            assert columns is not None
            start = rows.start - param.rows.start
            part = direction[start : start + rows.stop - rows.start]
            weight_kn.index_add_(1, columns, part, alpha=-alpha)
            return
        local = picked
        if not _all_rows(rows, param):
            local, inside = _local(picked, rows.start, rows.stop)
            direction = direction.masked_fill(~inside[:, None], 0.0)
        if columns is None:
            weight_kn.index_add_(0, local, direction, alpha=-alpha)
        else:
            where = (local.long()[:, None], columns.long()[None])
            weight_kn.index_put_(where, direction * -alpha, accumulate=True)

    def outside(
        self, param: ProjectedParam, projected: Tensor, span: slice, share: float = 1.0
    ) -> Tensor:
        """See `Projector.outside`: the gradient with the selected entries set to zero."""
        if share != 1.0:
            return super().outside(param, projected, span, share)
        chunk = param.grad[span].clone()
        rows, columns = self._indices(param)
        start = param.rows.start + (span.start or 0)
        if rows is None:
            assert columns is not None
            return chunk.index_add_(1, columns, projected[span].to(chunk.dtype), alpha=-1.0)
        if columns is None and _all_rows(param.rows.part(span), param):
            return chunk.index_add_(0, rows, projected.to(chunk.dtype), alpha=-1.0)
        local, inside = _local(rows, start, start + len(chunk))
        mask_k = torch.ones(len(chunk), dtype=chunk.dtype, device=chunk.device)
        mask_k.index_add_(0, local, inside.to(chunk.dtype), alpha=-1.0)
        if columns is None:
            return chunk.mul_(mask_k[:, None])
        selected_n = torch.zeros(chunk.shape[1], dtype=chunk.dtype, device=chunk.device)
        selected_n.index_fill_(0, columns.long(), 1.0)
        return chunk.mul_(1.0 - (1.0 - mask_k)[:, None] * selected_n)

    def outside_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        good_b: Tensor | None = None,
    ) -> list[RowsOutside]:
        """See `Projector.outside_together`: what isn't selected, in one pass over each piece."""
        first = params[0]
        if first.geometry.side is Side.BOTH:
            return super().outside_together(params, projected_b, good_b)
        ((key, (size, _)),) = first.geometry.basis_shapes.items()
        index_b = torch.stack([param.state[key + INDEX] for param in params]).long()
        kept_b = torch.ones(len(params), size, dtype=torch.bool, device=index_b.device)
        kept_b.scatter_(1, index_b, False)
        if good_b is not None:
            kept_b.logical_and_(good_b.view(-1, 1))
        zero = torch.zeros((), dtype=first.grad.dtype, device=first.grad.device)
        right = first.geometry.side is Side.RIGHT

        def of(param: ProjectedParam, kept: Tensor) -> RowsOutside:
            def rows(span: slice) -> Tensor:
                mask = kept[None] if right else kept[span, None]
                return torch.where(mask, param.grad[span], zero)

            return rows

        return list(map(of, params, kept_b.unbind(0)))


def _all_rows(rows: RowRange, param: ProjectedParam) -> bool:
    """Whether a range has all rows of a matrix."""
    return rows.start == 0 and rows.stop == param.geometry.shape[0]


def _local(index: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Positions relative to rows [start, stop), clamped, and which of them are in that range."""
    local = index - start
    return local.clamp(0, max(0, stop - start - 1)), (local >= 0) & (local < stop - start)
