"""Norms of a gradient and its projection along the projected axis, with no m x n temporary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.devices import on_gpu
from ..engine.fp32 import exact_fp32
from ..engine.geometry import Side
from ..engine.processes import ALONE, Processes
from .base import ProjectedParam, Projector

ROUGH_SHARE = 0.3
#: What `safe_norm` sends in fp32: a largest number with its mark, and a sum.
NORM_BYTES = 12


def axis_norms(matrix: Tensor, axis: int) -> Tensor:
    """Euclidean norms along an axis (kept with length 1), in fp32 (fp64 for fp64)."""
    if matrix.dtype == wide_dtype(matrix):
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=axis, keepdim=True)
        return norms
    if on_gpu(matrix):  # whose reductions upcast as they read
        norms = torch.linalg.vector_norm(matrix, dim=axis, keepdim=True, dtype=torch.float32)
        return norms
    # A reduction of a half-precision tensor in fp32 would copy all of it.
    rows, columns = matrix.shape
    size = (1, columns) if axis == 0 else (rows, 1)
    squares = torch.zeros(size, dtype=torch.float32, device=matrix.device)
    for span in row_chunks(matrix):
        chunk = squares if axis == 0 else squares[span]
        chunk += matrix[span].float().square_().sum(axis, keepdim=True)
    return squares.sqrt_()


def gradient_norms(param: ProjectedParam, axis: int) -> Tensor:
    """`axis_norms` of a gradient; those of columns (axis 0) over the rows of all processes."""
    norms, processes = axis_norms(param.grad, axis), param.rows.processes
    if axis == 1 or processes.alone:
        return norms
    return processes.sum(norms.double().square()).sqrt_().to(norms.dtype)


def gradient_norms_together(params: Sequence[ProjectedParam], axis: int) -> Tensor:
    """`gradient_norms` of B matrices of one shape, whole here: B x 1 x n or B x m x 1 in fp32."""
    grad = params[0].grad
    size = [len(params), *grad.shape]
    size[1 + axis] = 1
    norms_b = grad.new_empty(size, dtype=wide_dtype(grad))
    for param, out in zip(params, norms_b.unbind(0), strict=True):
        torch.linalg.vector_norm(param.grad, dim=axis, keepdim=True, dtype=out.dtype, out=out)
    return norms_b


def safe_norms(
    norms_b: Tensor, dtype: torch.dtype | None = None, divisor: float | Tensor = 1.0
) -> Tensor:
    """`safe_norm` of each of B tensors, B x 1 x 1; fp64 holds the squares of fp32.

    Args:
        norms_b: nonnegative numbers.
        dtype: of the result, theirs if None.
        divisor: the result is divided by it; not 0.
    """
    if norms_b.dtype == torch.float64:
        wide_b = torch.stack([safe_norm(norms) for norms in norms_b.unbind(0)]).view(-1, 1, 1)
    else:
        wide_b = torch.linalg.vector_norm(norms_b, dim=(1, 2), keepdim=True, dtype=torch.float64)
    norm_b = wide_b.new_empty(wide_b.shape, dtype=dtype or norms_b.dtype)
    return torch.div(wide_b, divisor, out=norm_b)


def safe_norm(norms: Tensor, processes: Processes = ALONE) -> Tensor:
    """The Euclidean norm of nonnegative numbers, 0-d, also where squares over- or underflow.

    Args:
        norms: of which each process has some.
        processes: those that have the others.
    """
    peak = processes.largest(norms.max() if norms.numel() else norms.new_zeros(()))
    # An infinite one stays infinite instead of inf / inf.
    scale = torch.where(peak.isfinite(), peak, 1.0).clamp(min=torch.finfo(norms.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(norms / scale)
    if not processes.alone:
        norm = processes.sum(norm.square()).sqrt_()
    return norm * scale


def weighted_norm(norms: Tensor, factors: Tensor, processes: Processes = ALONE) -> Tensor:
    """The norm of what has these norms by index, times factors, 0-d; a factor 0 leaves nothing."""
    return safe_norm(torch.where(factors == 0, 0.0, norms * factors), processes)


def keeps_norms(basis: Tensor, projector: Projector, beta: float) -> bool:
    """Whether back-projection keeps norms, as nearly as a residual with factor `beta` asks for."""
    small = abs(beta) <= ROUGH_SHARE
    exact = projector.orthonormal and projector.storage.exact
    return exact and (small or basis.dtype == wide_dtype(basis))


def reconstructed_squares(
    param: ProjectedParam,
    projected: Tensor,
    projected_squares: Tensor,
    projector: Projector,
    axis: int,
    beta: float,
) -> Tensor:
    """||(P R)_j||^2 (left; R P^T on the right) by column j (row j): ||R_j||^2 if P is orthonormal.

    A bf16 basis is orthonormal to 0.5 %, an error that enters with beta^2: for a small beta that is
    below the other rounding errors.
    """
    (basis,) = projector.bases(param)
    if keeps_norms(basis, projector, beta):
        return projected_squares
    wide = projected.to(projected_squares.dtype)
    with exact_fp32():
        products = projector.rotation(param, (basis,))(wide)
    squares: Tensor = (products * wide).sum(axis, keepdim=True)
    return squares.clamp_(min=0)


def outside_norm(
    param: ProjectedParam,
    projected: Tensor,
    projector: Projector,
    phi: Tensor,
    squares: Tensor,
    projected_squares: Tensor,
    kept: Tensor,
    beta: float,
) -> Tensor:
    """||phi o (G - beta P R)||, 0-d, from norms by column (by row for a right projection).

    If the difference would cancel (nearly all of the gradient lies in the subspace), the CPU
    computes the norm directly, in chunks; on a GPU, where the test would synchronise, it is clamped
    to the rounding error.
    """
    by_index = squares - 2 * beta * projected_squares + beta**2 * kept
    if not on_gpu(param.grad):
        outside, total = param.across.sum(torch.stack([by_index.sum(), squares.sum()]))
        if bool(outside < 1e-3 * total):
            return _direct_norm(param, projected, projector, phi, beta)
    floor = squares * torch.finfo(squares.dtype).eps
    return weighted_norm(torch.maximum(by_index, floor).sqrt_(), phi, param.across)


@exact_fp32()
def _direct_norm(
    param: ProjectedParam, projected: Tensor, projector: Projector, phi: Tensor, beta: float
) -> Tensor:
    left = param.geometry.side is Side.LEFT
    total = torch.zeros((), dtype=phi.dtype, device=phi.device)
    for span in row_chunks(param.grad):
        outside = projector.outside(param, projected, span, beta)
        factors = phi if left else phi[span]
        total += torch.linalg.vector_norm(outside.to(phi.dtype) * factors).square()
    return param.rows.processes.sum(total).sqrt_()
