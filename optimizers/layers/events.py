"""What a method's schedule does to its layers, as hooks hear of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerEvent:
    """Something that happened to factored layers in one step.

    Attributes:
        kind: "merge", "switch", "resample", "redecompose", "refactor" or "requantize".
        step: optimizer steps taken when it happened.
        layers: how many layers took part.
        change: largest relative change of an effective weight, ||W' - W|| / ||W||, where the method
            rounds it ("requantize"); None where it stays.
    """

    kind: str
    step: int
    layers: int
    change: float | None = None


EventHook = Callable[[LayerEvent], None]
