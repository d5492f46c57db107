"""Projection of a gradient and back-projection of an update: one GEMM each.

With `dtype` lower than the weights' (say bf16 under fp32) both GEMMs run in that precision, on
chunks of bounded size along the axis that is not projected, so that no m x n temporary is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.chunks import row_chunks
from ..engine.devices import on_gpu
from ..engine.geometry import Geometry, RowRange, Side
from .operand import HALF, half_product


def largest_entry(tensor: Tensor) -> Tensor:
    """The largest absolute entry, 0-d; 0 of an empty tensor, NaN where there is one."""
    if not tensor.numel():
        return tensor.new_zeros(())
    largest: Tensor = torch.linalg.vector_norm(tensor, torch.inf)
    return largest


def _left_rows(basis_mr: Tensor, rows: RowRange) -> Tensor:
    return basis_mr[rows.start : rows.stop]


def rows_of(projected: Tensor, geometry: Geometry, held: RowRange, wanted: RowRange) -> Tensor:
    """The part of a projected tensor that belongs to some rows; all of it for a left projection."""
    if geometry.side is not Side.RIGHT or held == wanted:
        return projected
    return projected[wanted.start - held.start : wanted.stop - held.start]


def project(
    grad_kn: Tensor,
    bases: Sequence[Tensor],
    geometry: Geometry,
    rows: RowRange,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Projects this process's rows of a gradient.

    Args:
        grad_kn: rows [start, stop) of the m x n gradient.
        bases: the basis (m x r on the left, n x r on the right), or both.
        geometry: side, rank and global shape.
        rows: the rows of `grad_kn`; a left projection is summed over their `processes`.
        dtype: precision of the GEMM; the gradient's own by default.

    Returns:
        r x n (left), k x r (right) or r x r (both), in the gradient's precision.
    """
    if dtype is not None and dtype != grad_kn.dtype:
        return _project_chunks(grad_kn, bases, geometry, rows, dtype)
    own = [basis.to(grad_kn.dtype) for basis in bases]
    if geometry.side is Side.RIGHT:
        return grad_kn @ own[0]
    projected_rn = rows.processes.sum(_left_rows(own[0], rows).mT @ grad_kn)
    return projected_rn if geometry.side is Side.LEFT else projected_rn @ own[1]


def project_into(
    out: Tensor, grad_kn: Tensor, basis: Tensor, geometry: Geometry, rows: RowRange
) -> None:
    """Writes `project` on one side, of rows that are all here, into a tensor."""
    if geometry.side is Side.RIGHT:
        torch.mm(grad_kn, basis, out=out)
    else:
        torch.mm(_left_rows(basis, rows).mT, grad_kn, out=out)


def _project_chunks(
    grad_kn: Tensor,
    bases: Sequence[Tensor],
    geometry: Geometry,
    rows: RowRange,
    dtype: torch.dtype,
) -> Tensor:
    k, n = grad_kn.shape
    r = geometry.rank
    own = [basis.to(dtype) for basis in bases]
    if geometry.side is Side.RIGHT:
        projected_kr = grad_kn.new_empty(k, r)
        for span in row_chunks(grad_kn):
            projected_kr[span] = grad_kn[span].to(dtype) @ own[0]
        return projected_kr
    basis_rk = _left_rows(own[0], rows).mT
    projected_rn = grad_kn.new_empty(r, n)
    for span in row_chunks(grad_kn.mT):
        projected_rn[:, span] = basis_rk @ grad_kn[:, span].to(dtype)
    projected_rn = rows.processes.sum(projected_rn)
    if geometry.side is Side.LEFT:
        return projected_rn
    return (projected_rn.to(dtype) @ own[1]).to(grad_kn.dtype)


def _factors(
    direction: Tensor, bases: Sequence[Tensor], geometry: Geometry, rows: RowRange
) -> tuple[Tensor, Tensor]:
    """Left and right factor of the back-projection, in the precision of `direction`."""
    own = [basis.to(direction.dtype) for basis in bases]
    if geometry.side is Side.RIGHT:
        return direction, own[0].mT  # k x r, r x n
    right = direction if geometry.side is Side.LEFT else direction @ own[1].mT
    return _left_rows(own[0], rows), right


def back_project(
    direction: Tensor, bases: Sequence[Tensor], geometry: Geometry, rows: RowRange
) -> Tensor:
    """The back-projection of `direction` for some rows, k x n, in fp32 (fp64 for fp64).

    On a GPU half-precision factors are multiplied in their own precision.
    """
    half = direction.dtype in HALF and on_gpu(direction)
    compute = direction.dtype if half else torch.promote_types(direction.dtype, torch.float32)
    left, right = _factors(direction.to(compute), bases, geometry, rows)
    return half_product(left, right) if half else left @ right


def write_back(
    weight_kn: Tensor,
    direction: Tensor,
    bases: Sequence[Tensor],
    geometry: Geometry,
    rows: RowRange,
    *,
    alpha: float,
    decay_factor: float,
    dtype: torch.dtype | None = None,
) -> None:
    """In place: weight <- decay_factor * weight - alpha * back-projection of `direction`.

    Args:
        weight_kn: this process's rows of the weight.
        direction: r x n (left), k x r (right) or r x r (both).
        bases: as in `project`.
        geometry: as in `project`.
        rows: as in `project`.
        alpha: step size times the back-projection's scale.
        decay_factor: 1 less the weight decay of this step.
        dtype: precision of the GEMM; the weight's own by default.
    """
    compute = weight_kn.dtype if dtype is None else dtype
    left, right = _factors(direction.to(compute), bases, geometry, rows)
    if compute == weight_kn.dtype:
        weight_kn.addmm_(left, right, beta=decay_factor, alpha=-alpha)
        return
    if decay_factor != 1.0:
        weight_kn.mul_(decay_factor)
    if geometry.side is Side.RIGHT:
        for span in row_chunks(weight_kn):
            weight_kn[span].add_(left[span] @ right, alpha=-alpha)
    else:
        for span in row_chunks(weight_kn.mT):
            weight_kn[:, span].add_(left @ right[:, span], alpha=-alpha)
