"""A method is a composition of the seams; this is the record of one group's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .options import ProjectionOptions
from .projectors import EveryK, Geometry, Projector, RowRange
from .rules import UpdateRule

STEP_BYTES = 4  # a 0-d fp32 tensor


@dataclass(frozen=True)
class Projection:
    """The projecting half of a composition.

    Attributes:
        projector: which subspace and how it is stored.
        schedule: when it is refitted.
        options: rank, side and scale.
    """

    projector: Projector
    schedule: EveryK
    options: ProjectionOptions

    def geometry(self, shape: Sequence[int]) -> Geometry:
        """Side, rank and shapes for a matrix of the given global shape."""
        rows, columns = shape
        return Geometry.of((rows, columns), self.options.rank, self.options.proj_type)


@dataclass(frozen=True)
class Composition:
    """An update rule, alone or in a subspace."""

    rule: UpdateRule
    projection: Projection | None = None

    def init_state(self, param: Tensor, *, capturable: bool) -> dict[str, Any]:
        """A parameter's whole state: `step`, and the entries of schedule, projector and rule."""
        device = param.device if capturable else torch.device("cpu")
        if param.device.type == "meta":
            device = param.device
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        if self.projection is None:
            return state | self.rule.init(param.shape, param)
        geometry = self.projection.geometry(param.shape)
        rows = RowRange.whole(param.shape[0])
        state["side"] = int(geometry.side)
        state |= self.projection.schedule.init()
        state |= self.projection.projector.init(geometry, param)
        return state | self.rule.init(geometry.low_shape(rows.stop - rows.start), param)

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes of a parameter's state by formula: the step count and what each seam states."""
        if self.projection is None:
            return STEP_BYTES + self.rule.state_bytes(shape, itemsize)
        geometry = self.projection.geometry(shape)
        return (
            STEP_BYTES
            + self.projection.projector.state_bytes(geometry, itemsize)
            + self.rule.state_bytes(geometry.low_shape(), itemsize)
        )
