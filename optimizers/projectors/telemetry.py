"""Measurements of a refresh, made only if there are refresh hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from .base import ProjectedParam
from .norms import safe_norm


@dataclass(frozen=True)
class RefreshEvent:
    """One matrix's refresh.

    Attributes:
        step: the step (1-based) that used the new basis first.
        name: the parameter's recorded name, or None.
        shape: (m, n).
        rank: r.
        seconds: wall time of the refresh; matrices refitted together share it evenly.
        captured_energy: ||projected G||^2 / ||G||^2 of the gradient that made the basis, in [0, 1].
        overlap: mean squared cosine of the principal angles to the previous subspace (1: the same,
            about r / d: a random one), the smaller of both sides for `full`; None at the first
            refresh.
    """

    step: int
    name: str | None
    shape: tuple[int, int]
    rank: int
    seconds: float
    captured_energy: float
    overlap: float | None


def captured_energy(param: ProjectedParam, projected: Tensor) -> float:
    """Share of the gradient's squared Frobenius norm in its projection."""
    kept, whole = (
        float(safe_norm(torch.linalg.vector_norm(tensor, dtype=wide_dtype(tensor)), processes))
        for tensor, processes in ((projected, param.across), (param.grad, param.rows.processes))
    )
    return min(1.0, (kept / whole) ** 2) if whole > 0 else 0.0


def overlap(previous: Sequence[Tensor], bases: Sequence[Tensor]) -> float:
    """Mean squared cosine between subspaces given by orthonormal bases (d x r), in [0, 1]."""
    cosines = []
    for old_dr, new_dr in zip(previous, bases, strict=True):
        between_rr = old_dr.to(torch.float32).mT @ new_dr.to(torch.float32)
        cosines.append(float(between_rr.square().sum()) / between_rr.shape[0])
    return min(cosines)
