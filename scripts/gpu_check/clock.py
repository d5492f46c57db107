"""Timing on a device: events around each call, a cold cache, medians."""

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


class Clock:
    """Times calls on one device, and knows when the time for all of it is up."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._end = time.monotonic() + seconds
        size = _FLUSH_BYTES if device.type == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

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
        self, call: Callable[[], Any], *, most: int = 30, seconds: float = 3.0, warm: int = 2
    ) -> Timing:
        """The median of up to `most` calls in about `seconds`, after `warm` that don't count."""
        for _ in range(warm):
            call()
        begin = time.monotonic()
        samples = [self.once(call)]
        while len(samples) < most and time.monotonic() - begin < min(seconds, self.left()):
            samples.append(self.once(call))
        return Timing(statistics.median(samples), min(samples), max(samples), len(samples))


def graphed(device: torch.device, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a replay of its CUDA graph; as it is on a CPU."""
    if device.type != "cuda":
        return call
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
