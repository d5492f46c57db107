"""A gradient as an operand of decompositions, without full copies in another precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.geometry import Side

HALF = (torch.bfloat16, torch.float16)
#: Devices on which half-precision products, Cholesky QR and batching are faster.
GPUS = ("cuda",)

# Entries in this range have squares that fp32 can sum; others are rescaled first.
SAFE_SCALE = (1e-12, 1e12)


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on one of `GPUS`."""
    return tensor.device.type in GPUS


class Operand:
    """A gradient viewed as a short-by-long matrix A (d x l).

    On a GPU products with a half-precision gradient have half-precision factors and fp32 sums,
    which is many times faster; elsewhere chunks of the gradient are upcast.
    """

    def __init__(self, grad_mn: Tensor, scale: float, side: Side) -> None:
        rows, columns = grad_mn.shape
        self.grad_mn = grad_mn
        # A is the gradient or its transpose; for a square one, such that the short side is `side`.
        self.wide = rows < columns or (rows == columns and side is not Side.RIGHT)
        self.short, self.long = min(rows, columns), max(rows, columns)
        self.dtype = wide_dtype(grad_mn)
        self.factor = 1.0 if SAFE_SCALE[0] <= scale <= SAFE_SCALE[1] else 1.0 / scale
        self.direct = grad_mn.dtype == self.dtype and self.factor == 1.0
        self.half = on_gpu(grad_mn) and grad_mn.dtype in HALF and self.factor == 1.0

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows, one copy at a time; the gradient itself if no cast is needed."""
        whole = [slice(0, len(self.grad_mn))]
        for span in whole if self.direct else row_chunks(self.grad_mn, product=True):
            piece = self.grad_mn[span].to(self.dtype)
            yield span, (piece if self.factor == 1.0 else piece * self.factor)

    def _rows_times(self, right_nk: Tensor) -> Tensor:
        if self.half:
            return half_product(self.grad_mn, right_nk)
        return torch.cat([piece @ right_nk for _, piece in self._pieces()])

    def _columns_times(self, right_mk: Tensor) -> Tensor:
        if self.half:
            return half_product(self.grad_mn.mT, right_mk)
        total: Tensor | None = None
        for span, piece in self._pieces():
            part = piece.mT @ right_mk[span]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def times(self, right_lk: Tensor) -> Tensor:
        """A X, d x k."""
        return self._rows_times(right_lk) if self.wide else self._columns_times(right_lk)

    def transposed_times(self, right_dk: Tensor) -> Tensor:
        """A^T X, l x k."""
        return self._columns_times(right_dk) if self.wide else self._rows_times(right_dk)

    def energy(self) -> Tensor:
        """||A||^2, 0-d fp64."""
        if self.half:  # GPU reductions upcast as they read
            norm = torch.linalg.vector_norm(self.grad_mn, dtype=torch.float32)
            energy: Tensor = norm.double().square()
            return energy
        norms = [torch.linalg.vector_norm(piece).double() for _, piece in self._pieces()]
        total: Tensor = torch.stack(norms).square().sum()
        return total

    def gram(self) -> Tensor:
        """A A^T, d x d, without a whole upcast copy of A."""
        if self.half:
            own = self.grad_mn if self.wide else self.grad_mn.mT
            return half_product(own, own.mT)
        total_dd: Tensor | None = None
        if not self.wide:
            for _, piece in self._pieces():
                part_dd = piece.mT @ piece
                total_dd = part_dd if total_dd is None else total_dd.add_(part_dd)
            assert total_dd is not None
            return total_dd
        if self.direct:
            return self.grad_mn @ self.grad_mn.mT
        total_dd = torch.zeros(self.short, self.short, dtype=self.dtype, device=self.grad_mn.device)
        for span in row_chunks(self.grad_mn.mT, product=True):
            piece = self.grad_mn[:, span].to(self.dtype) * self.factor
            total_dd.addmm_(piece, piece.mT)
        return total_dd


def half_product(left: Tensor, right: Tensor) -> Tensor:
    """left X, both rounded to the type of `left`, in fp32."""
    right = right.to(left.dtype)
    if left.is_cuda:
        summed: Tensor = torch.mm(left, right, out_dtype=torch.float32)
        return summed
    return left.float() @ right.float()


def cast_product(grad_mn: Tensor, other: Tensor, transposed: bool) -> Tensor:
    """G X or G^T X in X's precision; a G of another one is cast in chunks of rows."""
    if grad_mn.dtype == other.dtype:
        product: Tensor = (grad_mn.mT if transposed else grad_mn) @ other
        return product
    m, n = grad_mn.shape
    result = other.new_zeros(n if transposed else m, other.shape[1])
    for span in row_chunks(grad_mn):
        piece = grad_mn[span].to(other.dtype)
        if transposed:
            result.addmm_(piece.mT, other[span])
        else:
            result[span] = piece @ other
    return result
