"""The first steps of a run measured phase by phase, to hold the plan's memory against them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.optimizers import state_bytes

from .memory import held_bytes
from .parts import Parts
from .phases import PhaseMeter


@dataclass(frozen=True)
class Found:
    """Peaks of the measured steps.

    Attributes:
        steps: how many.
        measured: bytes by phase: "forward", "backward", "step", and "refresh" for steps in which
            bases or layers were renewed.
        planned: the plan's, for the same phases; None where the run can't be planned, with why.
        why: see `planned`.
    """

    steps: int
    measured: Mapping[str, int]
    planned: Mapping[str, int] | None
    why: str = ""

    @property
    def peak(self) -> int:
        """The largest measured one."""
        return max(self.measured.values(), default=0)


class MeasuredSteps:
    """Measures the first `log.memory_steps` steps that a process takes.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._left = parts.config.log.memory_steps
        self._taken = 0
        self._meter: PhaseMeter | None = None
        self._updates: dict[str, str] = {}

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A context for a pass."""
        if not self._left:
            return contextlib.nullcontext()
        if self._meter is None:
            parts = self._parts
            held = held_bytes(parts.model) + state_bytes(parts.optimizer)
            self._meter = PhaseMeter(parts.world.device, held)
            self._meter.__enter__()
        return self._meter.phase(name)

    @contextlib.contextmanager
    def update(self, renewed: Callable[[], bool]) -> Iterator[None]:
        """A context for the optimizer's step, after which `renewed` tells whether anything was."""
        name = f"step {self._taken}"
        with self.phase(name):
            yield
        if self._left:
            self._updates[name] = "refresh" if renewed() else "step"

    def after_step(self) -> Found | None:
        """What was found, after the last step that is measured."""
        if not self._left:
            return None
        self._taken += 1
        self._left -= 1
        return None if self._left else self._finish()

    def close(self) -> None:
        """Ends measuring, whatever is missing."""
        meter, self._meter, self._left = self._meter, None, 0
        if meter is not None:
            meter.__exit__(None, None, None)

    def _finish(self) -> Found:
        meter, parts = self._meter, self._parts
        assert meter is not None
        self.close()
        peaks: dict[str, int] = {}
        for called, peak in meter.peaks.items():
            name = self._updates.get(called, called)
            peaks[name] = max(peak, peaks.get(name, 0))
        try:
            planned = _planned(parts)
        except ValueError as error:
            return Found(self._taken, peaks, None, str(error))
        return Found(self._taken, peaks, {name: planned[name] for name in peaks})


def _planned(parts: Parts) -> Mapping[str, int]:
    """The plan's peaks of a run.

    Raises:
        ValueError: it can't be planned.
    """
    from .plan.planner import plan_run

    return plan_run(parts.config, parts.world.size, parts.world.device.type).peaks
