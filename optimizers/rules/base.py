"""The update-rule seam: from a gradient (whole or projected) to the step of a weight.

A rule is a frozen record of hyper-parameters over pure functions on lists of tensors. It owns the
state keys that its `init` makes and never sees a basis: the same rule serves projected and plain
parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

State = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """What a rule wants done: weight <- keep * weight - alpha * (back-projection of) delta.

    Attributes:
        delta: a tensor of the (projected) gradient's shape.
        alpha: step size that is not in `delta` yet.
        keep: 1 less this step's decoupled weight decay; a 0-d tensor where it is only known on
            the device.
    """

    delta: Tensor
    alpha: float
    keep: float | Tensor


class UpdateRule(ABC):
    """Moments of a gradient and the update they give."""

    #: Whether only matrices can be updated.
    matrices_only: ClassVar[bool] = False

    @abstractmethod
    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """State entries for a (projected) gradient of `shape`, for a parameter `like`."""

    @abstractmethod
    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes of these entries, for parameters of `itemsize` bytes an entry."""

    @abstractmethod
    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """Advances the moments in place and returns each weight's update.

        Args:
            grads: descent gradients or their projections; may be overwritten when projected.
            states: each parameter's state; `step` already counts this step.
            weights: the parameters themselves, read only (Adafactor scales by their size).
        """

    def apply(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> None:
        """Updates plain weights in place."""
        for weight, update in zip(weights, self.update(grads, states, weights), strict=True):
            if isinstance(update.keep, Tensor) or update.keep != 1.0:
                weight.mul_(update.keep)
            weight.add_(update.delta.to(weight.dtype), alpha=-update.alpha)


def numel(shape: Sequence[int]) -> int:
    """Number of entries of a tensor of `shape`."""
    return torch.Size(shape).numel()


def scalar(value: float | Tensor) -> float:
    """A learning rate as a float; one on a device is read back."""
    return float(value)
