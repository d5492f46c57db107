"""Adam for the trained parts of a factored layer, whose schedule counts in the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .adam import Adam
from .base import State


@dataclass(frozen=True)
class FactorAdam(Adam):
    """Adam that keeps how many events its layer has seen (`events`).

    With `restarts` the bias corrections count from `refreshed_at`.
    """

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero moments and counts."""
        counts: State = {"events": 0}
        if self.restarts:
            counts["refreshed_at"] = 0
        return super().init(shape, like) | counts
