"""Transport of moments from a subspace to the one that replaces it."""

from __future__ import annotations

from ..projectors import Bases, ProjectedParam
from ..rules import UpdateRule
from .composition import Projection
from .fp32 import exact_fp32


@exact_fp32()
def transport_moments(
    param: ProjectedParam, previous: Bases, projection: Projection, rule: UpdateRule
) -> None:
    """In place: adapts a matrix's moments to its new bases, as its option `moments` says.

    Args:
        param: the matrix, with its new bases stored.
        previous: the previous bases.
        projection: the group's projection.
        rule: the update rule that owns the moments.
    """
    rotation = projection.projector.rotation(param, previous)
    rule.transport_moments(param.state, projection.options.moments, rotation)
