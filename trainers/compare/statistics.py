"""Means over seeds, their standard errors, paired differences, and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: the mean, infinite where a value is.
        error: its standard error; None for one value, or where one is not finite.
        count: number of values.
    """

    mean: float
    error: float | None
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard error; None without values."""
    if not values:
        return None
    if not all(math.isfinite(value) for value in values):
        return Spread(math.inf, None, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Spread(statistics.fmean(values), error, len(values))


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Spread | None:
    """Of the differences to others, over the seeds that both have; None without any.

    Seeds on which either broke off are left out, which `Spread.count` shows.
    """
    gaps = [
        value - others[seed]
        for seed, value in values.items()
        if seed in others and math.isfinite(value) and math.isfinite(others[seed])
    ]
    return spread(gaps)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other is better than in both, by rising first coordinate.

    Less is better in each; a point equal to another in both stays with it.
    """
    front = [
        name
        for name, (x, y) in points.items()
        if math.isfinite(x)
        and math.isfinite(y)
        and not any((a <= x and b <= y) and (a < x or b < y) for a, b in points.values())
    ]
    return sorted(front, key=lambda name: points[name])
