"""When a basis is refitted: the second seam of a method."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

#: Value of `refreshed_at` of a matrix that has no basis yet.
NEVER = -1


@dataclass(frozen=True)
class EveryK:
    """A refresh at steps 0, gap, 2 gap, ... counted before the step's increment, as GaLore does.

    A refresh that failed (a zero or non-finite gradient, a solver that did not converge) is tried
    again at each following step until it succeeds.

    Attributes:
        gap: steps between refreshes, at least 1 (`update_proj_gap`).
        stagger: spread the matrices' refreshes evenly over the gap, so that no step stalls; the
            first refresh is everyone's first step all the same.
    """

    gap: int
    stagger: bool = False

    def init(self) -> dict[str, int]:
        """State entries of a matrix without a basis."""
        return {"refreshed_at": NEVER}

    def due(self, state: Mapping[str, Any], taken: int, index: int, count: int) -> bool:
        """Whether matrix `index` of `count` refits its basis after `taken` steps."""
        last = int(state["refreshed_at"])
        if last == NEVER:
            return True
        phase = (index * self.gap // count) if self.stagger else 0
        return (taken + phase) // self.gap > (last + phase) // self.gap

    def refreshed(self, state: MutableMapping[str, Any], taken: int) -> None:
        """Records a refresh that succeeded."""
        state["refreshed_at"] = taken
