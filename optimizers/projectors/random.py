"""Random bases, redrawn at each refresh.

"gaussian" (APOLLO, arXiv 2412.05270; Flora, arXiv 2402.03293): P has entries N(0, 1/r), so that
P^T G keeps norms in expectation; its columns are not orthonormal. P is regenerated whenever it is
read, from (`seed`, the matrix's name, the step of the refresh): the same values on each call and
on every device. Memory: none.

"orthonormal" (FRUGAL, arXiv 2411.07837; "random" of Online Subspace Descent's code): the leading
singular vectors of a Gaussian matrix. They have the distribution of the Q factor of a d x r
Gaussian matrix, which is what is computed. Regenerating it at each step would cost 2 d r^2 flops,
so it is stored.
Memory: min(m, n) r entries (std).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda import gaussian as normal_numbers

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.geometry import Geometry
from ..engine.seeds import draw_seed
from ..storage.base import DenseBasis
from .base import Bases, ProjectedParam, Projector

DISTRIBUTIONS = ("gaussian", "orthonormal")


def gaussian(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """A d x r matrix with entries N(0, 1/r), in fp32 (fp64 for fp64) on the device of `like`.

    The same numbers on every device (`lowrank.cuda.gaussian`).

    Raises:
        RuntimeError: a CUDA graph is being captured; its replays would keep this seed, and so this
            basis, after a refresh.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "distribution='gaussian' while a CUDA graph is captured: accepted is 'orthonormal' or "
            "another projector, whose bases are stored"
        )
    drawn = normal_numbers(shape, seed, wide_dtype(like), like.device)
    return drawn.mul_(shape[1] ** -0.5)


def usable(param: ProjectedParam) -> bool:
    """Whether the gradient is finite; reads one number back."""
    return bool(torch.linalg.vector_norm(param.grad, torch.inf).isfinite())


@dataclass(frozen=True)
class RandomProjector(Projector):
    """Random bases.

    Attributes:
        distribution: "gaussian" (regenerated) or "orthonormal" (stored).
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("distribution",)
    FITS_GRADIENT: ClassVar[bool] = False

    distribution: str = "gaussian"

    def __post_init__(self) -> None:
        checks.choice("distribution", self.distribution, DISTRIBUTIONS)
        if self._drawn and self.storage != DenseBasis():
            raise ValueError(
                "basis with distribution='gaussian': accepted is None; nothing is stored"
            )

    @property
    def _drawn(self) -> bool:
        return self.distribution == "gaussian"

    @property
    def orthonormal(self) -> bool:
        """See `Projector.orthonormal`."""
        return not self._drawn

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Nothing, or zero bases."""
        return {} if self._drawn else super().init(geometry, like)

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes of these entries."""
        return 0 if self._drawn else super().state_bytes(geometry, itemsize)

    def _draw(self, param: ProjectedParam, refreshed: int) -> Bases:
        return tuple(
            gaussian(shape, draw_seed(self.seed, param.seed_name, refreshed, key), param.weight)
            for key, shape in param.geometry.basis_shapes.items()
        )

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Draws new bases; a matrix with a non-finite gradient keeps its previous ones."""
        fitted: list[Bases | None] = []
        for param in params:
            if not usable(param):
                fitted.append(None)
                continue
            bases = self._draw(param, param.steps_done)
            if not self._drawn:
                bases = tuple(torch.linalg.qr(basis).Q for basis in bases)
                self.store(param, bases)
            fitted.append(bases)
        return fitted

    def _read(self, param: ProjectedParam) -> Bases:
        if not self._drawn:
            return super()._read(param)
        return self._draw(param, int(param.state["refreshed_at"]))
