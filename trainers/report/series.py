"""Figures over steps: what a run's metrics become once read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


_GROWTH = 6  # points after which the smoothing window is one point longer


@dataclass(frozen=True, eq=False)
class Series:
    """One figure over the steps of a run.

    Attributes:
        steps: (N,) completed optimizer steps, in the order of the file.
        values: (N,) the figure at these steps; always finite.
    """

    steps: IntArray
    values: FloatArray

    def __post_init__(self) -> None:
        if self.steps.shape != self.values.shape or self.steps.ndim != 1:
            raise ValueError(
                f"steps {self.steps.shape} and values {self.values.shape} of a series differ; "
                "two vectors of one length are accepted"
            )

    @classmethod
    def of(cls, points: Iterable[tuple[int, float]]) -> Series:
        """Builds a series from (step, value) pairs; values that are not finite are left out."""
        pairs = list(points)
        steps = np.array([step for step, _ in pairs], dtype=np.int64)
        values = np.array([value for _, value in pairs], dtype=np.float64)
        finite = np.isfinite(values)
        return cls(steps[finite], values[finite])

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first(self) -> float | None:
        """The first value, None in an empty series."""
        return float(self.values[0]) if len(self) else None

    @property
    def last(self) -> float | None:
        """The last value, None in an empty series."""
        return float(self.values[-1]) if len(self) else None

    @property
    def highest(self) -> float | None:
        """The largest value, None in an empty series."""
        return float(self.values.max()) if len(self) else None

    def since(self, step: int) -> Series:
        """The part from `step` on."""
        kept = self.steps >= step
        return Series(self.steps[kept], self.values[kept])

    def mapped(self, values: FloatArray) -> Series:
        """The same steps with other values; what is not finite is left out."""
        finite = np.isfinite(values)
        return Series(self.steps[finite], values[finite])


def smoothing_window(count: int) -> int:
    """Steps that a smoothed curve of `count` points averages over: a fortieth, 5 to 500."""
    return min(max(count // 40, 5), 500)


def smoothed(series: Series) -> Series:
    """The exponential moving average of a series.

    Its window grows with the points seen, up to `smoothing_window`: at the start, where a loss
    falls steeply, the average follows it closely instead of lagging behind.
    """
    longest = smoothing_window(len(series))
    values = np.empty_like(series.values)
    mean = 0.0
    for index, value in enumerate(series.values.tolist()):
        mean += (value - mean) / min(1 + index / _GROWTH, longest)
        values[index] = mean
    return Series(series.steps, values)


def thinned(series: Series, limit: int) -> Series:
    """Keeps at most about `limit` points, and of each stretch its smallest and largest.

    A plot of the result has the outline of the full one: no spike is lost.

    Args:
        series: Of any length.
        limit: Points to keep, at least 4.
    """
    if limit < 4:
        raise ValueError(f"limit is {limit}; 4 or more is accepted")
    count = len(series)
    if count <= limit:
        return series
    edges = np.linspace(0, count, limit // 2, dtype=np.int64)
    kept = {0, count - 1}
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        stretch = series.values[start:stop]
        kept.add(start + int(stretch.argmin()))
        kept.add(start + int(stretch.argmax()))
    order = np.array(sorted(kept), dtype=np.int64)
    return Series(series.steps[order], series.values[order])
