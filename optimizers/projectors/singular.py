"""The projector of GaLore, Q-GaLore and Fira: leading singular vectors of the gradient."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.geometry import RowRange
from ..engine.seeds import draw_seed
from . import apply, decompositions, subspace
from .base import Bases, ProjectedParam, Projector

#: Modes to try in turn if a solver does not converge.
FALLBACKS = {
    "svd": ("eigh", "randomized"),
    "eigh": ("svd", "randomized"),
    "randomized": ("eigh", "svd"),
    "warm": ("randomized", "eigh"),
}


def align_signs(basis_dr: Tensor, previous_dr: Tensor) -> Tensor:
    """Flips columns with a negative inner product with their previous ones, as moments need."""
    agreement_r = (basis_dr * previous_dr.to(basis_dr.dtype)).sum(0)
    return basis_dr * torch.where(agreement_r < 0, -1.0, 1.0)


def largest_entries(matrices: Sequence[Tensor]) -> Tensor:
    """The largest absolute entry of each matrix, fp64."""
    return torch.stack([apply.largest_entry(matrix).double() for matrix in matrices])


def _usable(scale: float, limit: float) -> bool:
    return scale > 0.0 and limit < math.inf


@dataclass(frozen=True)
class SingularProjector(Projector):
    """Bases from the singular vectors of the gradient (GaLore, arXiv 2403.03507, section 3).

    Memory: min(m, n) r entries (std), or (m + n) r (full).

    Attributes:
        refresh: one of `decompositions.REFRESH_MODES`; `seed` and the step determine the sketches
            of "randomized".
        rotate: bases of "randomized" and "warm" are singular vectors; False allows any orthonormal
            basis of their span, which saves one r x r eigendecomposition per matrix.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("refresh", "rotate")

    refresh: str = "eigh"
    rotate: bool = True

    def __post_init__(self) -> None:
        checks.choice("rotate", self.rotate, (True, False))
        if not self.rotate and self.refresh not in ("randomized", "warm"):
            raise ValueError(
                f"rotate=False with refresh={self.refresh!r}: accepted are 'randomized' and "
                "'warm', the others give singular vectors only"
            )

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Refits matrices of one shape together; a zero or non-finite gradient keeps its basis."""
        batches: dict[Hashable, list[int]] = defaultdict(list)
        for index, param in enumerate(params):
            grad = param.grad
            kind = (param.geometry, param.rows, grad.dtype, grad.device)
            key = (*kind, param.fitted, param.steps_done)
            batches[key].append(index)
        fitted: list[Bases | None] = [None] * len(params)
        for indices in batches.values():
            for index, bases in zip(
                indices, self._fit_batch([params[i] for i in indices]), strict=True
            ):
                fitted[index] = bases
        return fitted

    def matrix(self, param: ProjectedParam) -> tuple[Tensor, RowRange]:
        """The matrix to decompose: its rows on this process, and which these are."""
        return param.grad, param.rows

    def _fit_batch(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        matrices = [self.matrix(param) for param in params]
        local = [matrix for matrix, _ in matrices]
        gradients = [param.grad for param in params]
        scales = largest_entries(local)
        # A part of a gradient may be finite where the whole, whose step is left out, is not.
        parts = any(part is not whole for part, whole in zip(local, gradients, strict=True))
        limits = largest_entries(gradients) if parts else scales
        known = params[0].rows.processes.largest(torch.stack([scales, limits])).tolist()
        usable = [i for i, pair in enumerate(zip(*known, strict=True)) if _usable(*pair)]
        fitted: list[Bases | None] = [None] * len(params)
        if not usable:
            return fitted
        chosen = [params[i] for i in usable]
        results = self._decompose(
            [local[i] for i in usable], [known[0][i] for i in usable], chosen, matrices[0][1]
        )
        for i, param, bases in zip(usable, chosen, results, strict=True):
            if bases is not None:
                aligned = self._aligned(param, bases)
                self.store(param, aligned)
                fitted[i] = aligned
        return fitted

    def _decompose(
        self,
        grads: list[Tensor],
        scales: list[float],
        params: Sequence[ProjectedParam],
        rows: RowRange,
    ) -> list[Bases | None]:
        geometry = params[0].geometry
        previous = [self.bases(param)[0] if param.fitted else None for param in params]
        # A batch shares its sketch, which doesn't depend on which matrices are in the batch.
        shape = "x".join(map(str, geometry.original_shape))
        seed = draw_seed(self.seed, shape, params[0].steps_done, "sketch")

        def attempt(picked: slice, mode: str) -> list[tuple[Tensor, ...]]:
            return decompositions.bases(
                grads[picked],
                scales[picked],
                geometry.rank,
                geometry.side,
                mode,
                previous[picked],
                seed,
                rotate=self.rotate,
                rows=rows,
            )

        try:
            return list(attempt(slice(None), self.refresh))
        except subspace.NotConverged:
            pass
        results: list[Bases | None] = []
        for i, param in enumerate(params):
            results.append(None)
            for mode in (self.refresh, *FALLBACKS[self.refresh]):
                try:
                    results[i] = attempt(slice(i, i + 1), mode)[0]
                    break
                except subspace.NotConverged:
                    continue
            if results[i] is None:
                warnings.warn(
                    f"no decomposition of the gradient of {param.name or geometry.shape} converged "
                    f"at step {param.steps_done}; its previous basis is kept and the refresh is "
                    "tried again",
                    stacklevel=2,
                )
        return results

    def _aligned(self, param: ProjectedParam, bases: Bases) -> Bases:
        # The official code's signs are those of LAPACK's SVD of the whole matrix.
        official = self.refresh == "svd" and param.rows.processes.alone
        if official or not param.fitted:
            return bases
        pairs = zip(bases, self.bases(param), strict=True)
        return tuple(align_signs(new, old) for new, old in pairs)
