"""What a `GradScaler` tells the step that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..sharding import is_dtensor
from .refusals import refuse_scaler

if TYPE_CHECKING:
    from ..optimizer import LowRankOptimizer


class Scale(NamedTuple):
    """A scaler's two numbers, which it sets as attributes of the optimizer.

    Attributes:
        factor: what the loss was multiplied by, 0-d.
        found_inf: whether a gradient in `.grad` is not finite; 0-d, or a number without gradients.
    """

    factor: Tensor
    found_inf: Any

    def overflows(self) -> bool:
        """Whether the scaler has found a gradient that is not finite; waits for the device."""
        return bool(self.found_inf)

    def inverse(self, like: Tensor) -> Tensor:
        """What gradients are to be multiplied by, as `unscale_` does it."""
        inverse: Tensor = self.factor.double().reciprocal().to(like)
        return inverse


def scale_of(optimizer: LowRankOptimizer, *, waits: bool) -> Scale | None:
    """The scale of the step that is being taken; None where no scaler takes it.

    Args:
        optimizer: whose step.
        waits: whether no update was made yet.

    Raises:
        ValueError: updates were made from scaled gradients; or it does not go with these.
    """
    if not hasattr(optimizer, "found_inf"):
        return None
    if not waits:
        refuse_scaler()
    factor = getattr(optimizer, "grad_scale", None)
    if factor is None:
        raise ValueError(
            "scaler.unscale_(optimizer) with update_in_backward, which finds only some of the "
            "gradients: accepted is max_norm of update_in_backward in its place"
        )
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            "GradScaler with update_in_backward and sharded parameters: accepted is bfloat16 "
            "without a scaler"
        )
    return Scale(factor, optimizer.found_inf)
