"""A step of matrices of one shape on a GPU: as one tensor, wherever that copies no gradient.

Products with a gradient, and into a weight, are one for each matrix. All between them (B projected
gradients, directions, norms) is in tensors with B as their first dimension, so that the number of
launches doesn't depend on B; see `docs/gpu_steps.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        projected_b: their projected gradients, B x ...
        projection: of their group.
        rule: of their group.
        good_b: see `UpdateRule.update_together`.
    """
    projector, residual = projection.projector, projection.residual
    states = [param.state for param in params]
    torch._foreach_add_([state["step"] for state in states], 1)
    axis = None
    if residual.NORMS:
        axis = 0 if params[0].geometry.side is Side.LEFT else 1
    weights = [param.weight for param in params]
    update = rule.update_together(projected_b, states, weights, axis, good_b)
    if not projection.options.stochastic_rounding and not isinstance(weights[0], QuantizedWeight):
        # In one launch what the products with single weights would do.
        update = replace(update, direction=update.direction.to(weights[0].dtype))
    written = residual.compute_together(params, projected_b, update, projector, good_b)
    apply_updates(written, params, projection)
