"""Peak memory phase by phase: what is allocated while something is done.

On a GPU the bytes are those of torch's allocator. On a CPU they are those of the profiler's record
of allocations, which is known only at the end and slows down what is recorded.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_PHASE = "phase: "
_ALLOCATION = "[memory]"


class PhaseMeter:
    """The peak of allocated bytes in each phase, and what there is at its end.

    Use it as a context; on a CPU the phases are known when it ends. Bytes count from what was there
    when it began. A phase that is entered again has the larger peak, and its latest end.

    Args:
        device: where.
        held: bytes that count and were there before.

    Attributes:
        peaks: bytes by phase.
        ends: bytes by phase.
    """

    def __init__(self, device: torch.device, held: int = 0) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._held = held
        gc.collect()  # else what earlier work has left in cycles may be freed, and count, later
        self._base = torch.cuda.memory_allocated(device) - held if self._on_gpu else 0
        self._profile: profile | None = None
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}

    def __enter__(self) -> PhaseMeter:
        if not self._on_gpu:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)  # type: ignore[no-untyped-call]
            if error[0] is None:
                self._read(_events(self._profile))
            self._profile = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside counts under this name."""
        if not self._on_gpu:
            with record_function(_PHASE + name):
                yield
            return
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - self._base
        self._note(name, peak, torch.cuda.memory_allocated(self._device) - self._base)

    def _note(self, name: str, peak: int, end: int) -> None:
        self.peaks[name] = max(peak, self.peaks.get(name, 0))
        self.ends[name] = end

    def _read(self, events: list[Any]) -> None:
        """Peaks from allocations in the order of time."""
        phases = sorted(
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in events
            if event.name().startswith(_PHASE)
        )
        changes = sorted(
            (event.start_ns(), event.nbytes()) for event in events if event.name() == _ALLOCATION
        )
        now, at = self._held, 0
        for begin, end, name in phases:
            while at < len(changes) and changes[at][0] < begin:
                now += changes[at][1]
                at += 1
            peak = now
            while at < len(changes) and changes[at][0] <= end:
                now += changes[at][1]
                peak = max(peak, now)
                at += 1
            self._note(name.removeprefix(_PHASE), peak, now)


def _events(record: profile) -> list[Any]:
    """Kineto's own events: torch's, made from them, take seconds where there are thousands."""
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    return list(results.events())
