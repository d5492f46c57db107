"""Bytes that an optimizer's step sends where parameters are spread over processes, by formula.

With the rows of an m x n matrix spread over w processes (`fully_shard`), between refreshes, for
entries of b bytes:

    right projection, m x r     nothing: each process projects, updates and writes its own rows
    left projection, r x n      r n b to the reduction (each process keeps n / w columns of the
                                sum), r n b / w to the gathering of the directions, as much again
                                for the projected gradient where residual or projector read it
    both, r x r                 r^2 b to a sum

to which come sums of single columns or rows that a rule or residual needs, 4 bytes a parameter for
the common decision that its gradient is finite, and in the same reduction 8 bytes by which options
are compared (`engine.equal_options`). Columns are padded to a multiple of w. Experts that one
parameter holds are spread whole, and need nothing.
"""

from __future__ import annotations

import torch

from .engine.composition import Composition
from .engine.decision import checked_together
from .engine.equal_options import STAMP_BYTES
from .engine.geometry import RowRange, Side
from .engine.parts import reads_projected
from .engine.processes import Processes
from .engine.sharding import Shard

FLAG_BYTES = 4


def compared_bytes(
    composition: Composition, shape: tuple[int, ...], dtype: torch.dtype, *, checked: bool
) -> int:
    """Bytes that the comparison of options adds to a step, if this parameter's reduction has it.

    Args:
        composition: of the parameter's group.
        shape: of the whole parameter.
        dtype: of its entries.
        checked: whether gradients are checked to be finite.
    """
    projected = composition.projection is not None
    together = checked and checked_together(dtype, projected=projected)
    return STAMP_BYTES if together and not composition.by_expert(shape) else 0


def step_bytes(
    composition: Composition, shape: tuple[int, ...], itemsize: int, world: int, *, checked: bool
) -> int:
    """Bytes that one process hands to collectives for a parameter, in a step without a refresh.

    `compared_bytes` come to them once a step.

    Args:
        composition: of the parameter's group.
        shape: of the whole parameter.
        itemsize: bytes of its entries.
        world: number of processes.
        checked: whether gradients are checked to be finite.
    """
    if composition.by_expert(shape):
        return 0
    shard = Shard(shape, RowRange.held(shape[0] if shape else 1, Processes(None, world, 0)))
    projection = composition.projection
    geometry = None if projection is None else projection.geometry(shape)
    part = shard.part(geometry)
    total = composition.rule.step_traffic(part, itemsize) + (FLAG_BYTES if checked else 0)
    if projection is None or geometry is None:
        return total
    rank, columns = geometry.projected_shape()
    if geometry.side is Side.LEFT:
        width = -(-columns // world)
        gathered = 2 if reads_projected(projection) else 1
        total += rank * width * itemsize * (world + gathered)
    elif geometry.side is Side.BOTH:
        total += rank * columns * itemsize
    return (
        total
        + projection.residual.step_traffic(geometry, itemsize, world)
        + projection.projector.step_traffic(geometry, itemsize, world)
    )
