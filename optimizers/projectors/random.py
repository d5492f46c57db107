"""Random bases, redrawn at each refresh.

"gaussian" (APOLLO, arXiv 2412.05270; Flora, arXiv 2402.03293): P has entries N(0, 1/r), so that
P^T G keeps norms in expectation; its columns are not orthonormal. P is regenerated whenever it is
read, from (`seed`, the matrix's name, the step of the refresh), on the parameter's device: the
same values on each call and on every device (`lowrank.cuda.gaussian`). Memory: none; with
`capturable=True` the 8 bytes of the number that it is drawn from, which a captured graph reads, so
that its replays follow a refresh.

"orthonormal" (FRUGAL, arXiv 2411.07837; "random" of Online Subspace Descent's code): the leading
singular vectors of a Gaussian matrix. They have the distribution of the Q factor of a d x r
Gaussian matrix, which is what is computed. Regenerating it at each step would cost 2 d r^2 flops,
so it is stored.
Memory: min(m, n) r entries (std).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank import cuda
from lowrank.cuda.noise import signed_seed

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.geometry import Geometry
from ..engine.seeds import draw_seed
from ..storage.base import DenseBasis
from .base import Bases, ProjectedParam, Projector

DISTRIBUTIONS = ("gaussian", "orthonormal")


#: After the key of the basis that is drawn from this number.
SEED = "_seed"
SEED_BYTES = 8


def gaussian(shape: tuple[int, int], seed: int | Tensor, like: Tensor) -> Tensor:
    """A d x r matrix with entries N(0, 1/r), the same on every device and card.

    Args:
        shape: (d, r).
        seed: 64 bits, or an int64 tensor with one entry on the device of `like`.
        like: gives device and precision: fp32, or fp64 for fp64.
    """
    drawn = cuda.gaussian(shape, seed, wide_dtype(like), like.device)
    return drawn.mul_(shape[1] ** -0.5)


def usable(params: Sequence[ProjectedParam]) -> list[bool]:
    """Whether each gradient is finite; reads one table back for each device."""
    found = [False] * len(params)
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        by_device[param.grad.device].append(i)
    for positions in by_device.values():
        largest = torch.stack([params[i].largest_entry().double() for i in positions])
        for i, entry in zip(positions, largest.tolist(), strict=True):
            found[i] = math.isfinite(entry)
    return found


@dataclass(frozen=True)
class RandomProjector(Projector):
    """Random bases.

    Attributes:
        distribution: "gaussian" (regenerated) or "orthonormal" (stored).
        capturable: what Gaussian bases are drawn from lies on the device, in the state; `for_group`
            fills it in.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("distribution",)
    FITS_GRADIENT: ClassVar[bool] = False

    distribution: str = "gaussian"
    capturable: bool = False

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

    def for_group(self, group: Mapping[str, Any]) -> RandomProjector:
        """With the group's choice of `capturable`."""
        return replace(self, capturable=bool(group.get("capturable", False)))

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """Nothing, numbers to draw from, or zero bases."""
        if not self._drawn:
            return super().init(geometry, like)
        keys = geometry.basis_shapes if self.capturable else ()
        return {key + SEED: torch.zeros((), dtype=torch.int64, device=like.device) for key in keys}

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes of these entries."""
        if not self._drawn:
            return super().state_bytes(geometry, itemsize)
        return SEED_BYTES * len(geometry.basis_shapes) if self.capturable else 0

    def _seeds(self, param: ProjectedParam, refreshed: int) -> list[int]:
        keys = param.geometry.basis_shapes
        return [draw_seed(self.seed, param.seed_name, refreshed, key) for key in keys]

    def _draw(self, param: ProjectedParam, seeds: Sequence[int | Tensor]) -> Bases:
        shapes = param.geometry.basis_shapes.values()
        return tuple(
            gaussian(shape, seed, param.weight) for shape, seed in zip(shapes, seeds, strict=True)
        )

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Draws new bases; a matrix with a non-finite gradient keeps its previous ones."""
        fitted: list[Bases | None] = []
        for param, sound in zip(params, usable(params), strict=True):
            if not sound:
                fitted.append(None)
                continue
            seeds = self._seeds(param, param.steps_done)
            bases = self._draw(param, seeds)
            if not self._drawn:
                bases = tuple(torch.linalg.qr(basis).Q for basis in bases)
                self.store(param, bases)
            elif self.capturable:
                for key, seed in zip(param.geometry.basis_shapes, seeds, strict=True):
                    param.state[key + SEED].fill_(signed_seed(seed))
            fitted.append(bases)
        return fitted

    def bases_together(self, params: Sequence[ProjectedParam]) -> list[Tensor]:
        """See `Projector.bases_together`: drawn as a list, in the gradients' precision."""
        first = params[0]
        if not self._drawn or first.read is not None:
            return super().bases_together(params)
        ((key, shape),) = first.geometry.basis_shapes.items()
        drawn = list(first.grad.new_empty(len(params), *shape).unbind(0))
        seeds: list[int] | list[Tensor]
        if self.capturable:
            seeds = [param.state[key + SEED] for param in params]
        else:
            seeds = [self._seeds(param, int(param.state["refreshed_at"]))[0] for param in params]
        cuda.fill_gaussian(drawn, seeds, shape[1] ** -0.5)
        for param, basis in zip(params, drawn, strict=True):
            param.read = (basis,)
        return drawn

    def scratch_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """See `Projector.scratch_bytes`: all that are drawn."""
        if not self._drawn:
            return super().scratch_bytes(geometry, itemsize)
        return itemsize * sum(size * rank for size, rank in geometry.basis_shapes.values())

    def _read(self, param: ProjectedParam) -> Bases:
        if not self._drawn:
            return super()._read(param)
        if self.capturable:
            return self._draw(param, [param.state[k + SEED] for k in param.geometry.basis_shapes])
        return self._draw(param, self._seeds(param, int(param.state["refreshed_at"])))
