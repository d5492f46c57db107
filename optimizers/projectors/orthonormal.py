"""Orthonormal bases of the columns of tall matrices, in batches.

- `householder`: torch.linalg.qr; any rank, but slow on GPUs. The choice on CPUs.
- `shifted_cholesky`: two rounds of Cholesky QR, the first one shifted, with columns of unit norm
  and a Gram matrix in fp64 (Fukaya et al., "Shifted Cholesky QR for computing the QR factorization
  of ill-conditioned matrices", 2020). All of it is products, batched Cholesky factors and
  triangular solves, without synchronisation: a tensor tells whether it succeeded.

Both keep the order of the columns: the first j vectors span the first j columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def householder(matrix: Tensor) -> Tensor:
    """Q of the reduced QR factorisation, (..., d, k) with k <= d."""
    orthonormal: Tensor = torch.linalg.qr(matrix).Q
    return orthonormal


def shifted_cholesky(matrix_bdk: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns by shifted Cholesky QR, without host synchronisation.

    Args:
        matrix_bdk: fp32 or fp64, k <= d.

    Returns:
        Q (b x d x k), and a boolean (b,): whether its columns are orthonormal to the precision,
        which may fail if the input is non-finite or (nearly) rank-deficient.
    """
    norms_b1k = torch.linalg.vector_norm(matrix_bdk, dim=-2, keepdim=True)
    scaled_bdk = matrix_bdk / norms_b1k
    first_bdk, succeeded_b, distance_b = _round(scaled_bdk, torch.float64, shifted=True)
    del scaled_bdk
    second_bdk, succeeded_again_b, smallest_b = _round(first_bdk, matrix_bdk.dtype, shifted=False)
    # The second round is accurate if the first result was nearly orthonormal, that is if its
    # Cholesky factor has a diagonal near 1; it is smaller in directions that the shift has shrunk.
    # A column whose distance from the span of those before it is rounding error is dependent.
    independent_b = distance_b > 4 * torch.finfo(matrix_bdk.dtype).eps
    return second_bdk, succeeded_b & succeeded_again_b & independent_b & (smallest_b > 0.5)


def _round(
    matrix_bdk: Tensor, dtype: torch.dtype, *, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Y R^-1 with R^T R = Y^T Y; whether R exists; the smallest diagonal entry of R."""
    wide_bdk = matrix_bdk.to(dtype)
    gram_bkk = wide_bdk.mT @ wide_bdk
    del wide_bdk
    if shifted:
        unit = torch.finfo(dtype).eps / 2
        # The largest row sum bounds the squared norm of Y.
        bound_b = gram_bkk.abs().sum(-1).amax(-1)
        # The rounding error of a Gram matrix in practice; the proven bound 11 (dk + k(k + 1)) is
        # far larger, and such a shift would shrink more directions than necessary.
        shift_b = matrix_bdk.shape[-1] * unit * bound_b
        gram_bkk.diagonal(dim1=-2, dim2=-1).add_(shift_b.unsqueeze(-1))
    lower_bkk, info_b = torch.linalg.cholesky_ex(gram_bkk)
    del gram_bkk
    diagonal_bk = lower_bkk.diagonal(dim1=-2, dim2=-1)
    solved_bdk = torch.linalg.solve_triangular(
        lower_bkk.mT.to(matrix_bdk.dtype), matrix_bdk, upper=True, left=False
    )
    finite_b = diagonal_bk.isfinite().all(-1)
    return solved_bdk, (info_b == 0) & finite_b, diagonal_bk.amin(-1)
