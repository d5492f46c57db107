"""Scheduled events of factored layers, as passed to hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerEvent:
    """An event of factored layers in one step.

    Attributes:
        kind: "merge", "switch", "resample", "redecompose", "refactor", "requantize" or
            "truncate".
        step: optimizer steps done at the event.
        layers: number of layers.
        change: largest relative change of an effective weight, ||W' - W|| / ||W||, if the event
            rounds or truncates it ("requantize", "truncate"); None if W is unchanged.
    """

    kind: str
    step: int
    layers: int
    change: float | None = None


EventHook = Callable[[LayerEvent], None]
