"""A gradient as an operand of decompositions, without full copies in another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.devices import on_gpu
from ..engine.geometry import RowRange, Side

#: A product with a fixed matrix.
Product = Callable[[Tensor], Tensor]
HALF = (torch.bfloat16, torch.float16)
# Entries in this range have squares that fp32 can sum; others are rescaled first.
SAFE_SCALE = (1e-12, 1e12)


class Operand:
    """A gradient viewed as a short-by-long matrix A (d x l).

    Its rows may be spread over processes; what enters and leaves products is whole on all of them.
    On a GPU products with a half-precision gradient have half-precision factors and fp32 sums,
    which is many times faster; elsewhere chunks of the gradient are upcast.
    """

    def __init__(
        self,
        grad_kn: Tensor,
        scale: float,
        side: Side,
        rows: RowRange | None = None,
    ) -> None:
        """An operand.

        Args:
            grad_kn: this process's rows of the gradient.
            scale: largest absolute entry of the whole gradient.
            side: the projected axis.
            rows: the rows held; all of them by default.
        """
        k, n = grad_kn.shape
        self.grad_kn, self.rows = grad_kn, RowRange.whole(k) if rows is None else rows
        m = self.rows.total
        # A is the gradient or its transpose; for a square one, such that the short side is `side`.
        self.wide = m < n or (m == n and side is not Side.RIGHT)
        self.short, self.long = min(m, n), max(m, n)
        self.dtype = wide_dtype(grad_kn)
        self.factor = 1.0 if SAFE_SCALE[0] <= scale <= SAFE_SCALE[1] else 1.0 / scale
        self.direct = grad_kn.dtype == self.dtype and self.factor == 1.0
        self.half = on_gpu(grad_kn) and grad_kn.dtype in HALF and self.factor == 1.0

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows, one copy at a time; the gradient itself if no cast is needed."""
        whole = [slice(0, len(self.grad_kn))]
        for span in whole if self.direct else row_chunks(self.grad_kn, product=True):
            piece = self.grad_kn[span].to(self.dtype)
            yield span, (piece if self.factor == 1.0 else piece * self.factor)

    def grad_times(self, right_nk: Tensor) -> Tensor:
        """G X, m x k: whole on every process."""
        if self.half:
            product = half_product(self.grad_kn, right_nk)
        elif len(self.grad_kn):
            product = torch.cat([piece @ right_nk for _, piece in self._pieces()])
        else:
            product = right_nk.new_empty(0, right_nk.shape[1], dtype=self.dtype)
        return self.rows.assemble(product)

    def grad_transposed_times(self, right_mk: Tensor) -> Tensor:
        """G^T X, n x k: whole on every process."""
        right_mk = right_mk[self.rows.start : self.rows.stop]
        if self.half:
            return self.rows.processes.sum(half_product(self.grad_kn.mT, right_mk))
        total: Tensor | None = None
        for span, piece in self._pieces():
            part = piece.mT @ right_mk[span]
            total = part if total is None else total.add_(part)
        if total is None:
            total = right_mk.new_zeros(self.grad_kn.shape[1], right_mk.shape[1], dtype=self.dtype)
        return self.rows.processes.sum(total)

    def times(self, right_lk: Tensor) -> Tensor:
        """A X, d x k."""
        return self.grad_times(right_lk) if self.wide else self.grad_transposed_times(right_lk)

    def transposed_times(self, right_dk: Tensor) -> Tensor:
        """A^T X, l x k."""
        return self.grad_transposed_times(right_dk) if self.wide else self.grad_times(right_dk)

    def along(self, side: Side) -> tuple[Product, Product]:
        """Products with the gradient whose rows are the projected axis, and with its transpose."""
        if side is Side.RIGHT:
            return self.grad_transposed_times, self.grad_times
        return self.grad_times, self.grad_transposed_times

    def energy(self) -> Tensor:
        """||A||^2, 0-d fp64."""
        if self.half:  # GPU reductions upcast as they read
            norms = [torch.linalg.vector_norm(self.grad_kn, dtype=torch.float32).double()]
        else:
            norms = [torch.linalg.vector_norm(piece).double() for _, piece in self._pieces()]
        zero = torch.zeros((), dtype=torch.float64, device=self.grad_kn.device)
        return self.rows.processes.sum(torch.stack([zero, *norms]).square().sum())

    @property
    def has_gram(self) -> bool:
        """Whether A A^T is a sum over processes; not where each has some rows of A."""
        return not self.wide or self.rows.processes.alone

    def gram(self) -> Tensor:
        """A A^T, d x d, without a whole upcast copy of A; only where `has_gram`."""
        return self.rows.processes.sum(self._local_gram())

    def _local_gram(self) -> Tensor:
        if self.half:
            own = self.grad_kn if self.wide else self.grad_kn.mT
            return half_product(own, own.mT)
        total_dd: Tensor | None = None
        if not self.wide:
            for _, piece in self._pieces():
                part_dd = piece.mT @ piece
                total_dd = part_dd if total_dd is None else total_dd.add_(part_dd)
            if total_dd is None:
                total_dd = self.grad_kn.new_zeros(self.short, self.short, dtype=self.dtype)
            return total_dd
        if self.direct:
            return self.grad_kn @ self.grad_kn.mT
        total_dd = torch.zeros(self.short, self.short, dtype=self.dtype, device=self.grad_kn.device)
        for span in row_chunks(self.grad_kn.mT, product=True):
            piece = self.grad_kn[:, span].to(self.dtype) * self.factor
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
