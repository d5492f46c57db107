"""A step's communication: projected gradients in, directions out, where a matrix is spread.

With the m rows of a gradient spread over processes, a right projection, m x r, needs nothing: each
process projects, updates and writes its own rows. A left one, r x n, is a sum over the rows: each
process receives the sum's columns that its moments belong to (reduce-scatter), and the directions
of all columns (all-gather), together the bytes of one all-reduce. A projection of both sides,
r x r, is summed, and updated on every process. Matrices that are updated together share each
collective.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..projectors import ProjectedParam, Projector
from ..rules import Update, UpdateRule
from .composition import Projection
from .geometry import Side
from .processes import Processes
from .sharding import part_of


def project_parts(params: Sequence[ProjectedParam], projector: Projector) -> list[Tensor]:
    """The parts of projected gradients that this process's moments belong to."""
    made: dict[int, Tensor] = {}
    together: dict[Hashable, list[int]] = {}
    for position, param in enumerate(params):
        processes, side = param.rows.processes, param.geometry.side
        if param.projected is not None:
            made[position] = param.projected
        elif processes.alone or side is Side.RIGHT:
            made[position] = projector.project(param)
        else:
            partial = projector.project(replace(param, rows=param.rows.alone()))
            made[position] = partial
            kind = side is Side.LEFT, processes, partial.dtype, partial.device
            together.setdefault(kind, []).append(position)
    for positions in together.values():
        partials = [made[position] for position in positions]
        processes, side = params[positions[0]].rows.processes, params[positions[0]].geometry.side
        scatters = side is Side.LEFT
        found = processes.scatter_all_columns(partials) if scatters else processes.sums(partials)
        made.update(zip(positions, found, strict=True))
    return [made[position] for position in range(len(params))]


def gather_updates(
    params: Sequence[ProjectedParam],
    parts: Sequence[Tensor],
    updates: Sequence[Update],
    projection: Projection,
) -> list[tuple[Tensor, Update]]:
    """What residual and write-back need: projected gradients and directions for all columns.

    Args:
        params: the matrices.
        parts: this process's parts of the projected gradients.
        updates: of these parts.
        projection: of the matrices' group.

    Returns:
        For each the projected gradient, as far as the residual or projector reads it, and the
        update.
    """
    made = list(zip(parts, updates, strict=True))
    spread: dict[Processes, list[int]] = {}
    for position, param in enumerate(params):
        if not param.rows.processes.alone and param.geometry.side is Side.LEFT:
            spread.setdefault(param.rows.processes, []).append(position)
    reads = reads_projected(projection)
    for processes, positions in spread.items():
        own = [updates[i].direction for i in positions]
        own += [parts[i] for i in positions] if reads else []
        columns = [params[i].geometry.projected_shape()[1] for i in positions]
        whole = _gathered(processes, own, columns * 2 if reads else columns)
        for place, i in enumerate(positions):
            projected = whole[len(positions) + place] if reads else parts[i]
            made[i] = projected, replace(updates[i], direction=whole[place], norms=None)
    return made


def _gathered(processes: Processes, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """All columns of tensors, in a collective for each dtype and device."""
    kinds: dict[Hashable, list[int]] = {}
    for position, part in enumerate(parts):
        kinds.setdefault((part.dtype, part.device), []).append(position)
    made = list(parts)
    for positions in kinds.values():
        found = processes.gather_all_columns(
            [parts[i] for i in positions], [counts[i] for i in positions]
        )
        for position, whole in zip(positions, found, strict=True):
            made[position] = whole
    return made


def reads_projected(projection: Projection) -> bool:
    """Whether anything after the update rule reads the projected gradient."""
    return projection.projector.TRACKS or projection.residual.READS_GRADIENT


def whole_first_moment(rule: UpdateRule, state: dict[str, Any]) -> Tensor | None:
    """The first moment of the whole projected gradient."""
    moment, part = rule.first_moment(state), part_of(state)
    if moment is None or part is None or part.axis is None:
        return moment
    return part.gather(moment)
