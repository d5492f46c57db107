"""A step's communication: projected gradients in, directions out, where a matrix is spread.

With the m rows of a gradient spread over processes, a right projection, m x r, needs nothing: each
process projects, updates and writes its own rows. A left one, r x n, is a sum over the rows: each
process receives the sum's columns that its moments belong to (reduce-scatter), and the directions
of all columns (all-gather), together the bytes of one all-reduce. A projection of both sides,
r x r, is summed, and updated on every process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..projectors import ProjectedParam, Projector
from ..rules import Update, UpdateRule
from .composition import Projection
from .geometry import Side
from .sharding import part_of


def project_part(param: ProjectedParam, projector: Projector) -> Tensor:
    """The part of the projected gradient that this process's moments belong to."""
    if param.projected is not None:
        return param.projected
    processes, side = param.rows.processes, param.geometry.side
    if processes.alone or side is Side.RIGHT:
        return projector.project(param)
    partial = projector.project(replace(param, rows=param.rows.alone()))
    return processes.scatter_columns(partial) if side is Side.LEFT else processes.sum(partial)


def gather_update(
    param: ProjectedParam, part: Tensor, update: Update, projection: Projection
) -> tuple[Tensor, Update]:
    """What residual and write-back need: projected gradient and direction for all columns.

    Args:
        param: the matrix.
        part: this process's part of the projected gradient.
        update: of this part.
        projection: of the matrix's group.

    Returns:
        The projected gradient, as far as the residual or projector reads it, and the update.
    """
    processes, geometry = param.rows.processes, param.geometry
    if processes.alone or geometry.side is not Side.LEFT:
        return part, update
    columns = geometry.projected_shape()[1]
    direction = processes.gather_columns(update.direction, columns)
    whole = processes.gather_columns(part, columns) if reads_projected(projection) else part
    return whole, replace(update, direction=direction, norms=None)


def reads_projected(projection: Projection) -> bool:
    """Whether anything after the update rule reads the projected gradient."""
    return projection.projector.TRACKS or projection.residual.READS_GRADIENT


def whole_first_moment(rule: UpdateRule, state: dict[str, Any]) -> Tensor | None:
    """The first moment of the whole projected gradient."""
    moment, part = rule.first_moment(state), part_of(state)
    if moment is None or part is None or part.axis is None:
        return moment
    return part.gather(moment)
