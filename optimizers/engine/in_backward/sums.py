"""What `update_in_backward` sums between the backward passes of a step."""

from __future__ import annotations

from torch import Tensor

from ..chunks import wide_dtype
from ..low_rank_gradients import places_in
from ..optimizer import LowRankOptimizer
from .sites import sites_of


def projected_gradient(optimizer: LowRankOptimizer, param: Tensor) -> Tensor | None:
    """A parameter's gradient as it is summed between backward passes.

    Args:
        optimizer: of the parameter, which has a gradient.
        param: the parameter.

    Returns:
        The projection of `.grad`, in fp32 (fp64 for fp64); None where the next step needs the
        gradient itself.
    """
    plans = optimizer._prepare()
    try:
        if id(param) not in places_in(plans, optimizer):
            return None
        projected = sites_of(plans)[id(param)].project()
        return projected.to(wide_dtype(projected))
    finally:
        for plan in plans:
            plan.release()
