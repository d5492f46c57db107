"""Rows of a cautious update with a quantised momentum, in one pass.

With codes and scales of `row_quantized` for the momentum M, a gradient G of k x n, and roots r and
c of the factors of a second moment:

    M <- M + s (G - M),    D_ij = M_ij / ((r_i c_j + eps) b)
    K_ij = 1 where D_ij G_ij > 0, else 0;    D_ij <- D_ij K_ij / max(mean_j(K_ij), 1e-3)

M is stored again after its use. s is 1 - b1, and b the bias correction 1 - b1^t
(`optimizers/rules/cautious.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import row_quantized
from .arguments import MASK64, dtype_code, expect, usable

#: Least share of a row's entries that its update is divided by.
LEAST_SHARE = 1e-3
#: Bits that are rounded stochastically.
NOISY_BITS = 4


def advance(moment_kn: Tensor, grad_kn: Tensor, share: float) -> Tensor:
    """M + s (G - M), in place; rounded after each operation, as kernels do."""
    return moment_kn.add_((grad_kn - moment_kn).mul_(share))


def directed(
    moment_kn: Tensor, by_row: Tensor, by_column: Tensor, eps: float, correction: float
) -> Tensor:
    """M / ((r c + eps) b), a new tensor."""
    denominator = (by_row.unsqueeze(1) * by_column).add_(eps).mul_(correction)
    return torch.div(moment_kn, denominator, out=denominator)


def agreeing(direction_kn: Tensor, grad_kn: Tensor) -> Tensor:
    """K, as booleans."""
    return direction_kn.sign() * grad_kn.sign() > 0


def cautious_factors(agrees_kn: Tensor, counts_k1: Tensor, columns: int) -> Tensor:
    """K over its mean in each row.

    Args:
        agrees_kn: K.
        counts_k1: how many of each whole row are 1, floating.
        columns: of a whole row.
    """
    shares_k1 = counts_k1.mul(1 / columns).clamp_(min=LEAST_SHARE)
    return agrees_kn.to(counts_k1.dtype).div_(shares_k1)


def cautious_rows(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    direction: Tensor,
    bits: int,
    cautious: bool,
    share: float,
    eps: float,
    correction: float,
    seed: int,
    first: int,
    stride: int,
) -> None:
    """The reference of `torch.ops.lowrank.cautious_rows`.

    Args:
        grad: G, k x n.
        codes: of M, uint8 of k x ceil(n bits / 8), advanced in place.
        scales: of M, fp32 of k x ceil(n / 128), advanced in place.
        by_row: r, k entries.
        by_column: c, n entries.
        direction: D, k x n in fp32 (or fp64), written.
        bits: of a code, 4 or 8.
        cautious: K is applied; else D is without it.
        share: s.
        eps: as above.
        correction: b.
        seed: of the noise with which four bits are rounded, signed.
        first: position of entry (0, 0) for it.
        stride: positions from one row to the next.
    """
    (rows, columns), wide = grad.shape, direction.dtype
    grad = grad.to(wide)
    moment = row_quantized.dequantize(codes, scales, columns, bits).to(wide)
    advance(moment, grad, share)
    noise = None
    if bits == NOISY_BITS:
        noise = row_quantized.noise_of(rows, columns, seed, first, stride, grad.device)
    new_codes, new_scales = row_quantized.quantize(moment, bits, noise)
    codes.copy_(new_codes)
    scales.copy_(new_scales)
    direction.copy_(directed(moment, by_row, by_column, eps, correction))
    if cautious:
        agrees = agreeing(direction, grad)
        counts = agrees.sum(1, keepdim=True).to(wide)
        direction.mul_(cautious_factors(agrees, counts, columns))


def cautious_rows_compiled(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    direction: Tensor,
    bits: int,
    cautious: bool,
    share: float,
    eps: float,
    correction: float,
    seed: int,
    first: int,
    stride: int,
) -> bool:
    """The compiled one; see `native_quantize` for what it returns."""
    wide = scales, by_row, by_column, direction
    library = usable(grad, codes, *wide)
    if library is None or {t.dtype for t in wide} != {torch.float32}:
        return False
    rows, columns = grad.shape
    expect("codes", codes, rows * row_quantized.code_bytes(columns, bits), torch.uint8)
    expect("scales", scales, rows * row_quantized.blocks(columns))
    expect("by_row", by_row, rows)
    expect("by_column", by_column, columns)
    expect("direction", direction, rows * columns)
    if bits not in row_quantized.LARGEST:
        raise ValueError(f"bits is {bits}; accepted: {sorted(row_quantized.LARGEST)}")
    library.call(
        "cautious_rows",
        grad.device,
        *(grad.data_ptr(), dtype_code(grad), codes.data_ptr(), scales.data_ptr()),
        *(by_row.data_ptr(), by_column.data_ptr(), direction.data_ptr(), rows, columns, bits),
        *(int(cautious), share, eps, correction, 1 / max(columns, 1)),
        *(seed & MASK64, first & MASK64, stride),
    )
    return True
