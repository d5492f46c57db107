"""Timing on a device: events around each call, a cold cache, medians, and a deadline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # more than any second-level cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call.

    Attributes:
        median: of the samples.
        low: the smallest.
        high: the largest.
        samples: how many.
    """

    median: float
    low: float
    high: float
    samples: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"ms_low": self.low, "ms_high": self.high, "samples": self.samples}


class Clock:
    """Times calls on one device, and knows when its section's time is up."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """Starts now.

        Args:
            device: where calls compute.
            seconds: until the deadline.
        """
        self.device = device
        self._end = time.monotonic() + seconds
        size = _FLUSH_BYTES if device.type == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call, after the caches were overwritten."""
        self._flush.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize()
        make = torch.cuda.Event
        start, stop = (make(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))

    def measure(
        self, call: Callable[[], Any], *, most: int = 20, seconds: float = 0.5, warm: int = 2
    ) -> Timing:
        """The median of up to `most` calls in about `seconds`, after `warm` that don't count.

        There is at least one sample, however little time is left.
        """
        for _ in range(warm):
            call()
        begin = time.monotonic()
        samples = [self.once(call)]
        while len(samples) < most and time.monotonic() - begin < min(seconds, self.left()):
            samples.append(self.once(call))
        return Timing(statistics.median(samples), min(samples), max(samples), len(samples))
