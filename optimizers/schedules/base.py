"""The schedule interface: when a basis is refitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..engine.geometry import Geometry

#: Value of `refreshed_at` of a matrix that has no basis yet.
NEVER = -1


@dataclass(frozen=True)
class Schedule(ABC):
    """When a matrix is refitted; all its values are in the parameter's flat state.

    Attributes:
        gap: steps between refreshes, at least 1 (`update_proj_gap`).
        stagger: spread the matrices' refreshes evenly over the gap, so that no step is much
            slower; the first refresh is at the first step for all of them.
    """

    #: Options that a group may set: the names of this class's fields.
    OPTIONS: ClassVar[tuple[str, ...]] = ()

    #: How many columns of the first basis `refreshed` reads, as it was before storage rounded it.
    COLUMNS_READ: ClassVar[int] = 0

    gap: int
    stagger: bool = False

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """State entries of a matrix without a basis."""
        return {"refreshed_at": NEVER}

    def state_bytes(self, geometry: Geometry) -> int:
        """Bytes of the tensors among these entries."""
        return 0

    def carry(self, previous: Schedule, old: Mapping[str, Any], new: dict[str, Any]) -> None:
        """Carries over the entries of a basis that is kept when the schedule is changed.

        Args:
            previous: the previous schedule.
            old: the parameter's state.
            new: the result of `init`; changed in place.
        """
        new["refreshed_at"] = old["refreshed_at"]

    @abstractmethod
    def due(self, state: Mapping[str, Any], steps_done: int, index: int, count: int) -> bool:
        """Whether matrix `index` of `count` refits its basis after `steps_done` steps."""

    def refreshed(
        self, state: MutableMapping[str, Any], steps_done: int, bases: Sequence[Tensor]
    ) -> None:
        """Records a successful refresh and its bases."""
        number = self.record(state, steps_done, bases)
        if number is not None:
            self.decide(state, float(number))

    def record(
        self, state: MutableMapping[str, Any], steps_done: int, bases: Sequence[Tensor]
    ) -> Tensor | None:
        """`refreshed`, up to a number (0-d), if any, that must be read back for `decide`."""
        state["refreshed_at"] = steps_done
        return None

    def decide(self, state: MutableMapping[str, Any], number: float) -> None:  # noqa: B027
        """Takes in what `record` returned."""


def passed(gap: int, last: int, steps_done: int, phase: int = 0) -> bool:
    """Whether a multiple of `gap` (less `phase`) is in (last, steps_done], or nothing is fitted."""
    return last == NEVER or (steps_done + phase) // gap > (last + phase) // gap


@dataclass(frozen=True)
class Once(Schedule):
    """One fit and no refresh, for an online projector; a failed fit is retried."""

    def due(self, state: Mapping[str, Any], steps_done: int, index: int, count: int) -> bool:
        """Until there is a basis."""
        return int(state["refreshed_at"]) == NEVER


@dataclass(frozen=True)
class EveryK(Schedule):
    """A refresh at steps 0, gap, 2 gap, ... counted before the step's increment, as GaLore does.

    A refresh that failed (a zero or non-finite gradient, a solver that did not converge) is tried
    again at each following step until it succeeds.
    """

    def due(self, state: Mapping[str, Any], steps_done: int, index: int, count: int) -> bool:
        """At every multiple of the gap, shifted for each matrix when staggered."""
        phase = (index * self.gap // count) if self.stagger else 0
        return passed(self.gap, int(state["refreshed_at"]), steps_done, phase)
