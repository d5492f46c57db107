"""The projector seam: which subspace, when it is refitted, how a gradient gets there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import apply
from .geometry import Geometry, RowRange
from .storage import BasisStorage, DenseBasis


@dataclass
class Slot:
    """One projected matrix during one step.

    Attributes:
        param: the weight, this process's rows of it (k x n).
        grad: its gradient with the sign of a descent, k x n.
        state: the parameter's flat state; projectors, schedules and rules own its keys.
        geometry: global shape, side and rank.
        rows: the rows held here.
        index: position among the optimizer's projected matrices.
        taken: steps taken before this one.
        name: the parameter's recorded name, if any.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    geometry: Geometry
    rows: RowRange
    index: int
    taken: int
    name: str | None = None


@dataclass(frozen=True)
class Projector(ABC):
    """A stateless strategy; every tensor it keeps lies in the slot's flat state.

    Attributes:
        storage: how bases are kept.
        dtype: precision of the projection GEMMs, the weights' own when None.
    """

    storage: BasisStorage = field(default_factory=DenseBasis)
    dtype: torch.dtype | None = None

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Tensor]:
        """State entries of a new matrix: zero bases."""
        state: dict[str, Tensor] = {}
        for key, shape in geometry.basis_shapes.items():
            state.update(self.storage.init(key, shape, like))
        return state

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes of all bases of one matrix."""
        shapes = geometry.basis_shapes.values()
        return sum(self.storage.state_bytes(shape, itemsize) for shape in shapes)

    @abstractmethod
    def fit(self, slots: Sequence[Slot]) -> list[bool]:
        """Refits the bases of the given matrices from their gradients (and moments).

        Returns:
            For each slot whether it has a new basis; where False the former one was kept.
        """

    def bases(self, slot: Slot) -> tuple[Tensor, ...]:
        """The stored bases, one or (full) two."""
        return tuple(self.storage.read(slot.state, key) for key in slot.geometry.basis_shapes)

    def project(self, slot: Slot) -> Tensor:
        """The projected gradient: r x n, k x r or r x r."""
        return apply.project(slot.grad, self.bases(slot), slot.geometry, slot.rows, self.dtype)

    def write_back(self, slot: Slot, delta: Tensor, *, alpha: float, keep: float) -> None:
        """In place: weight <- keep * weight - alpha * back-projection of `delta`."""
        apply.write_back(
            slot.param,
            delta,
            self.bases(slot),
            slot.geometry,
            slot.rows,
            alpha=alpha,
            keep=keep,
            dtype=self.dtype,
        )

    def track(self, slot: Slot, low: Tensor) -> None:  # noqa: B027 (optional)
        """Called after the write-back; a projector that learns online moves its basis here."""
