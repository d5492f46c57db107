"""A step of matrices of one shape on a GPU: as one tensor, wherever that copies no gradient.

Products with a gradient, and into a weight, are one for each matrix. All between them (B projected
gradients, directions, norms) is in tensors with B as their first dimension, so that the number of
launches doesn't depend on B; see `docs/gpu_steps.md`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..projectors import ProjectedParam
from ..rules import UpdateRule
from ..weights import QuantizedWeight
from .composition import Projection
from .devices import on_gpu
from .geometry import Geometry, Side
from .write import apply_updates


def may_join(param: ProjectedParam) -> bool:
    """Whether a matrix is worked on together with others of its shape."""
    geometry = param.geometry
    return on_gpu(param.weight) and param.rows.processes.alone and type(geometry) is Geometry


def scratch_sizes(
    params: Sequence[ProjectedParam], projection: Projection, rule: UpdateRule
) -> list[int]:
    """Bytes that each of several matrices takes of the scratch of its batch."""
    known: dict[Hashable, int] = {}
    sizes = []
    for param in params:
        joins = may_join(param)
        key = (param.geometry, param.weight.dtype, joins)
        if key not in known:
            known[key] = _scratch_size(param, projection, rule, joins=joins)
        sizes.append(known[key])
    return sizes


def _scratch_size(
    param: ProjectedParam, projection: Projection, rule: UpdateRule, *, joins: bool
) -> int:
    geometry, itemsize = param.geometry, param.weight.element_size()
    entries = math.prod(geometry.projected_shape())
    projector = projection.projector
    bases = projector.scratch_bytes(geometry, itemsize)
    if not joins:
        return entries * rule.SCRATCH * max(4, itemsize) + bases
    projected = entries * itemsize
    update = entries * rule.scratch_bytes(
        param.weight.dtype, param.state, overwrites=_overwrites(projection)
    )
    if projection.residual.BACK_PROJECTS:
        update += bases
    # At the highest of these moments: bases are read, moments updated, bases tracked.
    return max(bases + projected, update, projected + projector.tracking_bytes(geometry, itemsize))


def _overwrites(projection: Projection) -> bool:
    """Whether directions may take the place of the projected gradients, which nothing reads."""
    return not projection.residual.READS_PROJECTED and not projection.projector.TRACKS


def update_together(
    params: Sequence[ProjectedParam],
    projected_b: Tensor,
    projection: Projection,
    rule: UpdateRule,
    good_b: Tensor | None = None,
) -> None:
    """Updates moments and weights of matrices of one geometry.

    Args:
        params: the matrices, which `may_join`.
        projected_b: their projected gradients, B x ...; overwritten where nothing reads them.
        projection: of their group.
        rule: of their group.
        good_b: see `UpdateRule.update_together`.
    """
    projector, residual = projection.projector, projection.residual
    if not residual.BACK_PROJECTS and not projector.TRACKS:
        for param in params:
            param.read = None  # bases that nothing reads any more
    states = [param.state for param in params]
    torch._foreach_add_([state["step"] for state in states], 1)
    axis = None
    if residual.NORMS:
        axis = 0 if params[0].geometry.side is Side.LEFT else 1
    weights = [param.weight for param in params]
    free = _overwrites(projection)
    update = rule.update_together(projected_b, states, weights, axis, good_b, overwrites=free)
    if not projection.options.stochastic_rounding and not isinstance(weights[0], QuantizedWeight):
        direction_b = _narrowed(update.direction, weights[0].dtype, projected_b if free else None)
        update = replace(update, direction=direction_b)
    written = residual.compute_together(params, projected_b, update, projector, good_b)
    apply_updates(written, params, projection)


def _narrowed(direction_b: Tensor, dtype: torch.dtype, free_b: Tensor | None) -> Tensor:
    """Directions in the weights' precision: in one launch what each product would do.

    Args:
        direction_b: the directions.
        dtype: of the weights.
        free_b: memory of that shape that may be written, if there is any.
    """
    if direction_b.dtype == dtype:
        return direction_b
    if free_b is not None and free_b.dtype == dtype:
        return free_b.copy_(direction_b)
    return direction_b.to(dtype)
