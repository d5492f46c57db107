"""Scheduled events of factored layers, as passed to hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerEvent:
    """An event of factored layers in one step.

    Attributes:
        kind: "merge", "switch", "resample", "redecompose", "refactor" or "requantize".
        step: optimizer steps done at the event.
        layers: number of layers.
        change: largest relative change of an effective weight, ||W' - W|| / ||W||, if the event
            rounds it ("requantize"); None if W is unchanged.
    """

    kind: str
    step: int
    layers: int
    change: float | None = None


EventHook = Callable[[LayerEvent], None]
