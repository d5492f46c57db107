"""Leading singular subspaces by subspace iteration, for several matrices of one shape together.

Randomized range finder and subspace iteration (Halko, Martinsson and Tropp, "Finding structure with
randomness", 2011), or the same from the previous basis; on real gradients one iteration of it is
enough. Products with the matrices are computed one by one, so no gradient is copied; all else is
batched. One iteration reads back one small table, whatever the number of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.cuda import rademacher

from ..engine.devices import on_gpu
from ..engine.scratch import SCRATCH_BYTES
from .operand import Operand
from .orthonormal import householder, shifted_cholesky

OVERSAMPLING = 16


@dataclass(frozen=True)
class Stop:
    """When subspace iteration ends.

    Attributes:
        iterations: largest number of them.
        outside: share of the squared norm that may stay outside the subspace.
        gain: relative gain of an iteration below which it ends.
        remaining: the same for the estimated gain of all further iterations.
    """

    iterations: int
    outside: float
    gain: float
    remaining: float


#: One more refresh gains more than more iterations would.
USUAL = Stop(12, 1e-3, 2e-5, 1e-4)
#: To the accuracy of a decomposition.
CONVERGED = Stop(100, 0.0, 1e-11, 1e-11)

#: Raised by a solver that does not converge.
NotConverged: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def orthonormal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal bases of the columns of d x k matrices.

    On a CPU by Householder QR; on a GPU by shifted Cholesky QR, with Householder QR for matrices
    on which that fails.
    """
    if not on_gpu(matrices[0]):
        return [householder(matrix) for matrix in matrices]
    return cholesky_or_householder(matrices)


def cholesky_or_householder(matrices: Sequence[Tensor]) -> list[Tensor]:
    """See `orthonormal`; reads back one small table."""
    # A stack of one matrix is a view of it, without a copy.
    single = len(matrices) == 1
    matrix_bdk = matrices[0].contiguous().unsqueeze(0) if single else torch.stack(list(matrices))
    made_bdk, succeeded_b = shifted_cholesky(matrix_bdk)
    del matrix_bdk
    return [
        made if succeeded else householder(matrix)
        for made, succeeded, matrix in zip(
            made_bdk.unbind(0), succeeded_b.tolist(), matrices, strict=True
        )
    ]


def eigh(symmetric: Tensor, anew: Callable[[], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, once more in fp64 where the fp32 solver fails.

    It may not converge, or give NaN without a word: so does LAPACK's `ssyevd` for some matrices
    whose entries differ by many orders of magnitude, as those of a gradient of rank 1 do.

    Args:
        symmetric: (..., d, d).
        anew: computes `symmetric` once more. With it the vectors take the place of `symmetric`,
            which saves its size; else that is unchanged.

    Returns:
        Values (..., d), ascending, and vectors (..., d, d), as columns.

    Raises:
        torch.linalg.LinAlgError: fp64 fails as well, or `symmetric` is not finite.
    """
    try:
        if anew is None:
            values, vectors = torch.linalg.eigh(symmetric)
        else:
            # Solvers work on columns: what they get is overwritten where it lies.
            vectors = symmetric.mT
            values = symmetric.new_empty(symmetric.shape[:-1])
            torch.linalg.eigh(vectors, out=(values, vectors))
        failed = not bool(vectors.isfinite().all())
    except NotConverged:
        failed = True
    if failed:
        if anew is not None:
            symmetric = anew()
        values, vectors = torch.linalg.eigh(symmetric.double())
        if not bool(vectors.isfinite().all()):
            raise NotConverged("the eigenvectors of a symmetric matrix are not finite")
    return values.to(symmetric.dtype), vectors.to(symmetric.dtype)


def together(operand: Operand, width: int) -> int:
    """Number of matrices per batch: one on a CPU, else as many as fit in `SCRATCH_BYTES`."""
    if not on_gpu(operand.grad_kn):
        return 1
    # A basis, its raw and scaled forms (one in fp64) and its image.
    each = width * (operand.long + 5 * operand.short) * operand.dtype.itemsize
    return max(1, SCRATCH_BYTES // each)


def iterate(
    operands: Sequence[Operand],
    starts: list[Tensor],
    rank: int,
    *,
    rotate: bool,
    stop: Stop = USUAL,
) -> list[Tensor]:
    """Subspace iteration from given ranges.

    At least one iteration for each matrix, until little of the gradient is outside the subspace
    or little more can be gained. Each costs two products with A.

    Args:
        operands: the matrices, d x l.
        starts: for each a d x k range, k >= rank, of which the first r columns are orthonormal;
            the list is changed, so that ranges are freed as better ones take their place.
        rank: r.
        rotate: rotate to the leading r singular vectors (Rayleigh-Ritz); otherwise k is r and the
            vectors are those of orthogonal iteration, which converge to singular vectors.
        stop: when to stop.

    Returns:
        For each matrix d x r, orthonormal.

    Raises:
        torch.linalg.LinAlgError: a product is not finite, or the rotation did not converge.
    """
    bases = starts
    images = [a.transposed_times(x) for a, x in zip(operands, bases, strict=True)]
    totals = torch.stack([operand.energy() for operand in operands]).tolist()
    # Where starts are only nearly orthonormal, their first r columns are orthonormal.
    captured = [[energy] for energy in _energies([image[:, :rank] for image in images])]
    active = list(range(len(operands)))
    nothing = bases[0].new_empty(0)
    for _ in range(stop.iterations):
        for i in active:  # an image is freed before the new basis is made
            bases[i] = operands[i].times(images[i])
            images[i] = nothing
        fresh = orthonormal([bases[i] for i in active])
        for i in active:
            bases[i] = fresh.pop(0)
            images[i] = operands[i].transposed_times(bases[i])
        now = _energies([images[i] for i in active])
        for i, energy in zip(active, now, strict=True):
            captured[i].append(energy)
        active = [i for i in active if not _settled(totals[i], captured[i], stop)]
        if not active:
            break
    if not rotate:
        return [basis[:, :rank] for basis in bases]
    grams_bkk = torch.stack([image.mT @ image for image in images])
    images.clear()
    _, vectors_bkk = eigh(grams_bkk)
    leading_bkr = vectors_bkk[..., -rank:].flip(-1)
    return [basis @ leading for basis, leading in zip(bases, leading_bkr, strict=True)]


def _settled(total: float, captured: Sequence[float], stop: Stop) -> bool:
    """Whether to stop iterating.

    Gains decrease geometrically, so two of them give an estimate of the rest (Aitken).
    """
    energy = captured[-1]
    gain = energy - captured[-2]
    if total - energy <= stop.outside * total or gain <= stop.gain * energy:
        return True
    if len(captured) < 3:
        return False
    fall = captured[-2] - captured[-3] - gain
    return fall > 0 and gain * gain <= stop.remaining * energy * fall


def _energies(images: Sequence[Tensor]) -> list[float]:
    energies: list[float] = torch.stack([_energy(image) for image in images]).tolist()
    if not all(map(math.isfinite, energies)):
        raise NotConverged("subspace iteration met a number that is not finite")
    return energies


def _energy(image: Tensor) -> Tensor:
    if on_gpu(image):
        norm: Tensor = torch.linalg.vector_norm(image).double()
    else:  # whose sums of many entries are less accurate
        norm = torch.linalg.vector_norm(image, dim=1).double().square().sum().sqrt()
    return norm.square()


def randomized(
    operands: Sequence[Operand],
    rank: int,
    seed: int,
    *,
    rotate: bool = True,
    stop: Stop = USUAL,
) -> list[Tensor]:
    """Randomized leading vectors of each d x l operand, d x r each.

    Args:
        operands: the matrices, finite.
        rank: r.
        seed: of the test matrix of random signs, which all operands share.
        rotate: see `iterate`; if True, `OVERSAMPLING` additional directions are sampled.
        stop: when to stop.
    """
    first = operands[0]
    width = min(rank + OVERSAMPLING, first.short) if rotate else rank
    bases: list[Tensor] = []
    step = together(first, width)
    for start in range(0, len(operands), step):
        batch = operands[start : start + step]
        ranges = orthonormal(_sketched(batch, width, seed))
        bases += iterate(batch, ranges, rank, rotate=rotate, stop=stop)
    return bases


def _sketched(operands: Sequence[Operand], width: int, seed: int) -> list[Tensor]:
    """Products with random signs, d x k each; the same signs for all operands and calls."""
    first = operands[0]
    # Signs are exact in any precision.
    dtype = first.grad_kn.dtype if first.half else first.dtype
    sketch_lk = rademacher((first.long, width), seed, dtype, first.grad_kn.device)
    return [operand.times(sketch_lk) for operand in operands]


def warm(
    operands: Sequence[Operand],
    rank: int,
    previous: Sequence[Tensor],
    seed: int,
    *,
    rotate: bool = True,
) -> list[Tensor]:
    """Subspace iteration for each d x l operand from its previous basis (d x r or l x r).

    With `rotate` 16 new directions are added to the previous ones: without them, a direction that
    is missing in the previous basis would grow from rounding errors alone.
    """
    first = operands[0]
    extra = min(OVERSAMPLING, first.short - rank) if rotate else 0
    bases: list[Tensor] = []
    step = together(first, rank + extra)
    for start in range(0, len(operands), step):
        batch = operands[start : start + step]
        starts = [old.to(first.dtype) for old in previous[start : start + step]]
        if len(starts[0]) != first.short:
            starts = orthonormal([a.times(x) for a, x in zip(batch, starts, strict=True)])
        if extra > 0:
            # Nearly orthonormal, which suffices: the first iteration orthonormalises them.
            signs_de = rademacher((first.short, extra), seed, first.dtype, first.grad_kn.device)
            signs_de *= first.short**-0.5
            starts = [torch.cat((own, signs_de), 1) for own in starts]
        bases += iterate(batch, starts, rank, rotate=rotate)
    return bases
