"""Orthonormal bases of the leading singular subspace of a gradient, by four algorithms.

All functions take same-shape gradients and return, for each, a basis with orthonormal columns in
the computing precision (fp32, or fp64 for fp64 gradients):

- `svd`: `torch.linalg.svd` of the whole matrix, vectors and signs unchanged: as the official
  packages compute. The other three decompose only matrices of the short side d.
- `eigh`: exact, from the d x d Gram matrix.
- `randomized`: range finder and subspace iteration, rotated to singular vectors; see `subspace`.
- `warm`: the same, started from the previous basis; on real gradients one iteration is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from ..engine.fp32 import exact_fp32
from ..engine.geometry import RowRange, Side
from ..engine.scratch import SCRATCH_BYTES
from .operand import Operand
from .subspace import CONVERGED, randomized, warm
from .subspace import eigh as solve

#: Accepted values of the option `refresh`.
REFRESH_MODES = ("svd", "eigh", "randomized", "warm")


def eigh(operands: Sequence[Operand], rank: int) -> list[Tensor]:
    """Exact leading vectors of each d x l operand from its Gram matrix, d x r each."""
    short, dtype = operands[0].short, operands[0].dtype
    together = max(1, SCRATCH_BYTES // (short * short * dtype.itemsize))
    bases: list[Tensor] = []
    for start in range(0, len(operands), together):
        batch = operands[start : start + together]
        grams = partial(_grams, batch)
        _, vectors_bdd = solve(grams(), grams)
        leading_bdr = vectors_bdd[..., -rank:].flip(-1)
        del vectors_bdd
        bases.extend(leading_bdr.unbind(0))
    return bases


def _grams(operands: Sequence[Operand]) -> Tensor:
    """B x d x d."""
    if len(operands) == 1:
        return operands[0].gram().unsqueeze(0)
    return torch.stack([operand.gram() for operand in operands])


def _other_side(operand: Operand, basis_dr: Tensor) -> Tensor:
    """The long-side singular vectors, l x r, that belong to short-side ones, signs included."""
    orthonormal_lr, upper_rr = torch.linalg.qr(operand.transposed_times(basis_dr))
    signs_r = torch.where(upper_rr.diagonal() < 0, -1.0, 1.0)
    aligned_lr: Tensor = orthonormal_lr * signs_r
    return aligned_lr


def svd(grad_mn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left (m x r) and right (n x r) singular vectors, signs as the solver gives them."""
    left_md, _, right_dn = torch.linalg.svd(grad_mn.to(wide_dtype(grad_mn)), full_matrices=False)
    return left_md[:, :rank], right_dn[:rank].mT


@exact_fp32()
def bases(
    grads: Sequence[Tensor],
    scales: Sequence[float],
    rank: int,
    side: Side,
    mode: str,
    previous: Sequence[Tensor | None],
    seed: int,
    *,
    rotate: bool = True,
    rows: RowRange | None = None,
) -> list[tuple[Tensor, ...]]:
    """Leading singular bases of same-shape gradients.

    Args:
        grads: m x n gradients, finite and not zero.
        scales: largest absolute entry of each.
        rank: r, at most min(m, n).
        side: which basis to compute; BOTH gives (m x r, n x r).
        mode: one of `REFRESH_MODES`; "warm" falls back to "randomized" without previous bases.
        previous: each matrix's previous first basis, or None.
        seed: of the sketches in "randomized" and "warm".
        rotate: rotate to singular vectors; False returns the vectors of the iteration in
            "randomized" and "warm", which saves an eigendecomposition of r x r.
        rows: the rows of the gradients that are here, if others are on other processes.

    Returns:
        A tuple of one (or, for BOTH, two) bases for each gradient, in the computing precision.

    Raises:
        torch.linalg.LinAlgError: the solver did not converge.
    """
    spread = rows is not None and not rows.processes.alone
    if mode == "svd" and not spread:
        pairs = [svd(grad, rank) for grad in grads]
        return [(pair if side is Side.BOTH else (pair[int(side)],)) for pair in pairs]
    if mode == "svd":  # as accurate by other means
        grads = [grad.double() for grad in grads]
    # The Gram matrix that is a sum over rows; it matters for a square gradient.
    short = Side.RIGHT if spread and mode in ("eigh", "svd") else side
    operands = [
        Operand(grad, scale, short, rows) for grad, scale in zip(grads, scales, strict=True)
    ]
    known = [old for old in previous if old is not None]
    if mode in ("eigh", "svd"):
        exact = operands[0].has_gram
        found = eigh(operands, rank) if exact else randomized(operands, rank, seed, stop=CONVERGED)
    elif mode == "warm" and len(known) == len(operands):
        found = warm(operands, rank, known, seed, rotate=rotate)
    else:
        found = randomized(operands, rank, seed, rotate=rotate)
    short_is_left = operands[0].wide
    results: list[tuple[Tensor, ...]] = []
    for operand, basis_dr in zip(operands, found, strict=True):
        if side is Side.BOTH:
            pair = (basis_dr, _other_side(operand, basis_dr))
            results.append(pair if short_is_left else pair[::-1])
        elif (side is Side.LEFT) == short_is_left:
            results.append((basis_dr,))
        else:
            results.append((_other_side(operand, basis_dr),))
    return results
