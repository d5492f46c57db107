"""A method as a composition of an update rule, projector, storage, schedule and residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..projectors import Projector
from ..residuals import Residual
from ..rules import UpdateRule
from ..rules.rows import SCALES
from ..schedules import Schedule
from . import experts
from .geometry import Geometry, RowRange
from .options import ProjectionOptions
from .processes import Processes
from .sharding import Shard, local_part, shard_of

STEP_BYTES = 4  # a 0-d fp32 tensor


@dataclass(frozen=True)
class Projection:
    """The projecting half of a composition.

    Attributes:
        projector: which subspace and how its basis is stored.
        schedule: when it is refitted.
        residual: how the gradient outside it is used.
        options: rank, side, scale and what happens to the moments when the subspace changes.
    """

    projector: Projector
    schedule: Schedule
    residual: Residual
    options: ProjectionOptions

    def geometry(self, shape: Sequence[int]) -> Geometry:
        """Side, rank and shapes for a parameter of the given global shape; of experts for each."""
        shape = experts.matrix_shape(shape)
        return self.projector.geometry(shape, self.options.rank_of(shape), self.options.proj_type)


@dataclass(frozen=True)
class Composition:
    """An update rule, alone or in a subspace.

    Attributes:
        rule: computes the updates.
        projection: the subspace, or None for a full-rank update.
        counters: integers that the method itself keeps in a parameter's state, initially 0.
    """

    rule: UpdateRule
    projection: Projection | None = None
    counters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.projection is not None:
            how = self.projection.options.moments
            if how not in self.rule.transports:
                raise ValueError(
                    f"moments={how!r}: the moments of {type(self.rule).__name__} accept "
                    f"{', '.join(map(repr, self.rule.transports))}"
                )

    def at_rate(self, group: Mapping[str, Any]) -> Composition:
        """The composition with the group's current learning rate; nothing is checked."""
        made = replace(self, rule=self.rule.at_rate(group["lr"]))
        if self.projection is None:
            return made
        if not self.reads_rate:
            return made
        projector = self.projection.projector.for_group(group)
        return replace(made, projection=replace(self.projection, projector=projector))

    @property
    def reads_rate(self) -> bool:
        """Whether the projector has a rate that depends on the learning rate."""
        return self.projection is not None and hasattr(self.projection.projector, "rate")

    def by_expert(self, shape: Sequence[int]) -> bool:
        """Whether a parameter is trained as E matrices, see `experts`."""
        matrices = self.projection is not None or self.rule.matrices_only
        return len(shape) == experts.DIMENSIONS and matrices

    def init_state(self, param: Tensor, *, capturable: bool) -> dict[str, Any]:
        """A parameter's whole state: `step`, and the entries of each part."""
        if self.by_expert(param.shape):
            return experts.init_state(self, param, capturable=capturable)
        local: Tensor = local_part(param.detach())
        device = param.device if capturable else torch.device("cpu")
        if param.device.type == "meta":
            device = param.device
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        state |= dict.fromkeys(self.counters, 0)
        if self.projection is not None:
            projection = self.projection
            geometry = projection.geometry(param.shape)
            state["side"] = int(geometry.side)
            state |= projection.schedule.init(geometry, local)
            state |= projection.projector.init(geometry, local)
            made = projection.residual.init(geometry, local)
            shard = shard_of(param)
            for key in projection.residual.WHOLE:
                if not shard.plain:
                    dim = 1 if shard.transposed else 0
                    made[key] = shard.distribute(made[key], dim, param.shape)
            state |= made
        return state | self.moments(param)

    def moments(self, param: Tensor) -> dict[str, Any]:
        """The rule's part of a parameter's state."""
        shard = shard_of(param)
        geometry = None
        if self.projection is not None:
            geometry = shard.seen(self.projection.geometry(param.shape))
        return new_moments(self.rule, shard, geometry, local_part(param.detach()))

    def state_bytes(self, shape: Sequence[int], itemsize: int, world: int = 1) -> int:
        """Bytes of a parameter's state by formula: the step count and the entries of each part.

        Args:
            shape: of the whole parameter.
            itemsize: bytes of its entries.
            world: number of processes that its rows are spread over; the first one's bytes.
        """
        if self.by_expert(shape):
            return experts.state_bytes(self, shape, itemsize, world)
        projection = self.projection
        geometry = None if projection is None else projection.geometry(shape)
        total = STEP_BYTES + self._moment_bytes(shape, geometry, itemsize, world)
        if projection is None or geometry is None:
            return total
        return (
            total
            + projection.schedule.state_bytes(geometry)
            + projection.projector.state_bytes(geometry, itemsize)
            + projection.residual.state_bytes(geometry, itemsize, world)
        )

    def _moment_bytes(
        self, shape: Sequence[int], geometry: Geometry | None, itemsize: int, world: int
    ) -> int:
        if world == 1:
            projected = shape if geometry is None else geometry.projected_shape()
            return self.rule.state_bytes(projected, itemsize)
        rows = RowRange.held(shape[0] if shape else 1, Processes(None, world, 0))
        return self.rule.part_bytes(Shard(tuple(shape), rows).part(geometry), itemsize)


def new_moments(
    rule: UpdateRule, shard: Shard, geometry: Geometry | None, like: Tensor
) -> dict[str, Any]:
    """A rule's state of a new parameter, spread over the processes as the parameter is.

    Args:
        rule: the update rule.
        shard: the part of the parameter that is here.
        geometry: its projection, if any.
        like: the local part.
    """
    part = shard.part(geometry)
    if part.transposed:  # stored as the parameter lies
        part = part.mirror()
    if shard.plain or part.axis is None:
        return rule.init(part.shape, like)
    whole = rule.init(part.shape, like.to("meta"))
    # Each part has the entries that the whole has, and their initial values.
    made = rule.deciding_for(part.shape).init(part.local_shape, like)
    for key, value in made.items():
        dim = rule.spread(key, part.axis, part.shape) if isinstance(value, Tensor) else None
        if not isinstance(value, Tensor):
            continue
        shape = list(whole[key].shape)
        if dim is not None:
            scales = key.endswith(SCALES)
            shape[dim] = len(part.processes.columns(shape[dim])) if scales else rule.held(key, part)
        # Other entries than the part's own: 8-bit scales of blocks that parts share.
        local = value if list(value.shape) == shape else value.new_zeros(shape)
        made[key] = local if dim is None else shard.distribute(local, dim, whole[key].shape)
    return made
