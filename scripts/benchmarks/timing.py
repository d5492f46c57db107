"""Timing that survives a noisy machine: round-robin, paired ratios, a canary."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Raises ValueError on no samples."""
        if not samples:
            raise ValueError("there are no samples; at least one is needed")
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median, lower, upper)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def milliseconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def disturbed(canaries: Sequence[float]) -> bool:
    """Whether the canary says that something else kept the machine busy.

    Canaries of a quiet machine differ by a few percent. Beyond a quarter the samples say more
    about the other work than about the contestants: threads that wait for each other at the end
    of every GEMM lose far more than their share.
    """
    return max(canaries) > 1.25 * min(canaries)


def canary() -> float:
    """Milliseconds of a fixed GEMM: what changes it is the machine, not the code under test."""
    side = 768
    left = torch.ones(side, side)
    out = torch.empty(side, side)
    return min(milliseconds(lambda: torch.mm(left, left, out=out)) for _ in range(3))


def round_robin(
    contestants: Mapping[str, Callable[[int], float]],
    rounds: int,
    *,
    seed: int = 0,
    after_round: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, list[float]], list[float]]:
    """Times every contestant once a round, in an order drawn anew each round.

    Args:
        contestants: name to a call that takes the round's number and returns milliseconds.
        rounds: how many, at least 1.
        seed: of the orders.
        after_round: called with the number of each finished round.

    Returns:
        Milliseconds of each contestant, by round; milliseconds of the canary before the first
        round and after each.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be 1 or more")
    order = list(contestants)
    shuffler = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    canary()
    canaries = [canary()]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(contestants[name](number))
            canaries.append(canary())
            gc.collect()
            after_round(number)
    finally:
        if collecting:
            gc.enable()
    return samples, canaries


def paired_ratios(samples: Sequence[float], reference: Sequence[float]) -> Spread:
    """Spread of the ratios within each round, so that a slow minute slows both sides."""
    return Spread.of([a / b for a, b in zip(samples, reference, strict=True)])
