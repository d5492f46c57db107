"""Orthonormal bases of the leading singular subspace of a gradient, four ways.

All functions take same-shape gradients and return, for each, a basis with orthonormal columns in
the computing precision (fp32, or fp64 for fp64 gradients):

- `svd`: `torch.linalg.svd` of the whole matrix, vectors and signs untouched: what the official
  packages compute. The other three work on the short side d alone.
- `eigh`: exact, from the d x d Gram matrix.
- `randomized`: range finder and subspace iteration (Halko, Martinsson and Tropp, 2011), rotated to
  singular vectors.
- `warm`: the same from the former basis; on real gradients one iteration is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .geometry import Side

#: Accepted values of the option `refresh`.
REFRESH_MODES = ("svd", "eigh", "randomized", "warm")

OVERSAMPLING = 16
MAX_ITERATIONS = 12
OUTSIDE = 1e-3  # share of the squared norm that may stay outside the subspace
GAIN = 4e-4  # relative gain of an iteration that is not worth another one
CHUNK_ELEMENTS = 1 << 22  # upcast copies of a low-precision gradient are made in pieces of 16 MiB
SCRATCH_BYTES = 256 << 20  # bound on the Gram matrices that are decomposed together

#: What a solver raises that does not converge.
NotConverged: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# Entries in this range have squares that fp32 sums safely; others are rescaled first.
SAFE_SCALE = (1e-12, 1e12)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of decompositions for gradients of `dtype`: fp64 stays, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Operand:
    """A gradient seen as its short-by-long matrix A (d x l), upcast (and rescaled) in pieces."""

    def __init__(self, grad_mn: Tensor, scale: float, side: Side) -> None:
        rows, columns = grad_mn.shape
        self.grad_mn = grad_mn
        # A is the gradient itself, else its transpose; a square one is turned to the wanted side.
        self.wide = rows < columns or (rows == columns and side is not Side.RIGHT)
        self.short, self.long = min(rows, columns), max(rows, columns)
        self.dtype = compute_dtype(grad_mn.dtype)
        self.factor = 1.0 if SAFE_SCALE[0] <= scale <= SAFE_SCALE[1] else 1.0 / scale
        self.direct = grad_mn.dtype == self.dtype and self.factor == 1.0

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows, one copy at a time; the gradient itself where it needs none."""
        rows, columns = self.grad_mn.shape
        step = rows if self.direct else max(1, CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            span = slice(start, min(start + step, rows))
            piece = self.grad_mn[span].to(self.dtype)
            yield span, (piece if self.factor == 1.0 else piece * self.factor)

    def _rows_times(self, right_nk: Tensor) -> Tensor:
        return torch.cat([piece @ right_nk for _, piece in self._pieces()])

    def _columns_times(self, right_mk: Tensor) -> Tensor:
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

    def energy(self) -> float:
        """||A||^2."""
        return sum(float(torch.linalg.vector_norm(piece)) ** 2 for _, piece in self._pieces())

    def gram(self) -> Tensor:
        """A A^T, d x d, without a whole upcast copy of A."""
        total_dd: Tensor | None = None
        if not self.wide:
            for _, piece in self._pieces():
                part_dd = piece.mT @ piece
                total_dd = part_dd if total_dd is None else total_dd.add_(part_dd)
            assert total_dd is not None
            return total_dd
        if self.direct:
            return self.grad_mn @ self.grad_mn.mT
        step = max(1, CHUNK_ELEMENTS // self.short)
        total_dd = torch.zeros(self.short, self.short, dtype=self.dtype, device=self.grad_mn.device)
        for i in range(0, self.long, step):
            piece = self.grad_mn[:, i : i + step].to(self.dtype) * self.factor
            total_dd.addmm_(piece, piece.mT)
        return total_dd


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, with one retry in fp64 where the fp32 solver does not converge."""
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except NotConverged:
        values, vectors = torch.linalg.eigh(symmetric.double())
    return values.to(symmetric.dtype), vectors.to(symmetric.dtype)


def _iterate(operand: Operand, basis_dk: Tensor, rank: int) -> Tensor:
    """Subspace iteration from an orthonormal range, rotated to singular vectors, d x r.

    One iteration at least; it stops when next to nothing of the gradient is left outside, or when
    an iteration gained next to nothing. Each costs two products with A and reads back one number.
    """
    total = operand.energy()
    image_lk = operand.transposed_times(basis_dk)
    captured = float(image_lk.square().sum())
    for _ in range(MAX_ITERATIONS):
        basis_dk = _orthonormal(operand.times(image_lk))
        image_lk = operand.transposed_times(basis_dk)
        former, captured = captured, float(image_lk.square().sum())
        if total - captured <= OUTSIDE * total or captured - former <= GAIN * captured:
            break
    _, vectors_kk = _eigh(image_lk.mT @ image_lk)  # Rayleigh-Ritz
    return basis_dk @ vectors_kk.flip(-1)[:, :rank]


def _orthonormal(matrix: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(matrix).Q
    return orthonormal


def eigh(operands: Sequence[Operand], rank: int) -> list[Tensor]:
    """Exact leading vectors of each d x l operand from its Gram matrix, d x r each."""
    short, dtype = operands[0].short, operands[0].dtype
    together = max(1, SCRATCH_BYTES // (short * short * dtype.itemsize))
    bases: list[Tensor] = []
    for start in range(0, len(operands), together):
        batch = operands[start : start + together]
        grams_bdd = torch.stack([operand.gram() for operand in batch])
        _, vectors_bdd = _eigh(grams_bdd)
        leading_bdr = vectors_bdd.flip(-1)[..., :rank]
        bases.extend(leading_bdr.unbind(0))
    return bases


def sketch(rows: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gaussian test matrix, rows x columns, the same on every device for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype).to(device)


def randomized(operands: Sequence[Operand], rank: int, seed: int) -> list[Tensor]:
    """Randomized leading vectors of each d x l operand, d x r each."""
    first = operands[0]
    width = min(rank + OVERSAMPLING, first.short)
    sketch_lk = sketch(first.long, width, seed, first.dtype, first.grad_mn.device)
    return [_iterate(operand, _orthonormal(operand.times(sketch_lk)), rank) for operand in operands]


def warm(operands: Sequence[Operand], rank: int, former: Sequence[Tensor]) -> list[Tensor]:
    """Subspace iteration for each d x l operand from its former basis (d x r or l x r)."""
    bases = []
    for operand, old in zip(operands, former, strict=True):
        start = old.to(operand.dtype)
        if len(start) != operand.short:
            start = _orthonormal(operand.times(start))
        bases.append(_iterate(operand, start, rank))
    return bases


def _other_side(operand: Operand, basis_dr: Tensor) -> Tensor:
    """The long-side singular vectors, l x r, that belong to short-side ones, signs included."""
    orthonormal_lr, upper_rr = torch.linalg.qr(operand.transposed_times(basis_dr))
    signs_r = torch.where(upper_rr.diagonal() < 0, -1.0, 1.0)
    aligned_lr: Tensor = orthonormal_lr * signs_r
    return aligned_lr


def svd(grad_mn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left (m x r) and right (n x r) singular vectors, signs as the solver gives them."""
    left_md, _, right_dn = torch.linalg.svd(
        grad_mn.to(compute_dtype(grad_mn.dtype)), full_matrices=False
    )
    return left_md[:, :rank], right_dn[:rank].mT


def bases(
    grads: Sequence[Tensor],
    scales: Sequence[float],
    rank: int,
    side: Side,
    mode: str,
    former: Sequence[Tensor | None],
    seed: int,
) -> list[tuple[Tensor, ...]]:
    """Leading singular bases of same-shape gradients.

    Args:
        grads: m x n gradients, finite and not zero.
        scales: largest absolute entry of each.
        rank: r, at most min(m, n).
        side: which basis is wanted; BOTH gives (m x r, n x r).
        mode: one of `REFRESH_MODES`; "warm" falls back to "randomized" without former bases.
        former: each matrix's former first basis, or None.
        seed: of the sketch in "randomized".

    Returns:
        A tuple of one (or, for BOTH, two) bases for each gradient, in the computing precision.

    Raises:
        torch.linalg.LinAlgError: the solver did not converge.
    """
    if mode == "svd":
        pairs = [svd(grad, rank) for grad in grads]
        return [(pair if side is Side.BOTH else (pair[int(side)],)) for pair in pairs]
    operands = [Operand(grad, scale, side) for grad, scale in zip(grads, scales, strict=True)]
    known = [old for old in former if old is not None]
    if mode == "eigh":
        short = eigh(operands, rank)
    elif mode == "warm" and len(known) == len(operands):
        short = warm(operands, rank, known)
    else:
        short = randomized(operands, rank, seed)
    short_is_left = operands[0].wide
    results: list[tuple[Tensor, ...]] = []
    for operand, basis_dr in zip(operands, short, strict=True):
        if side is Side.BOTH:
            pair = (basis_dr, _other_side(operand, basis_dr))
            results.append(pair if short_is_left else pair[::-1])
        elif (side is Side.LEFT) == short_is_left:
            results.append((basis_dr,))
        else:
            results.append((_other_side(operand, basis_dr),))
    return results
