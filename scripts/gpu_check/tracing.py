"""What a call does beside taking time: operations, launches, waits of the host; and CUDA graphs."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .files import Json

Call = Callable[[], Any]

#: The runtime's calls that start work on the device, and those in which the host waits for it.
LAUNCH = re.compile(r"^cu(da)?(Launch\w*|GraphLaunch\w*|Memcpy\w*|Memset\w*)$")
WAIT = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize\w*$")
#: Kernels that are named, by the time that they take.
TOP = 8


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(call: Call) -> Json:
    """Operations that reach torch's dispatcher, and numbers that the host reads out of tensors.

    Views are among them; what a kernel library is asked directly is not.
    """
    with _Counting() as mode:
        call()
    return {
        "operations": sum(mode.counts.values()),
        "host_reads": mode.counts["_local_scalar_dense"],
        "most_called": dict(mode.counts.most_common(TOP)),
    }


#: Operations that start nothing on a device.
_FREE = re.compile(r"^(empty|empty_like|empty_strided|new_empty\w*|detach_?|alias|lift_fresh)$")


class _Starting(_Counting):  # type: ignore[no-untyped-call]
    """Counts neither views nor memory that is only taken."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or _FREE.match(name)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def started(call: Call) -> Json:
    """Operations that would start something on a device, and numbers that are read back.

    Returns:
        "started", "host_reads" and the names "most_started".
    """
    with _Starting() as mode:
        call()
    reads = mode.counts.pop("_local_scalar_dense", 0)
    return {
        "started": sum(mode.counts.values()),
        "host_reads": reads,
        "most_started": dict(mode.counts.most_common(TOP)),
    }


def device_work(call: Call) -> Json:
    """Launches, waits, time and longest kernels of a call on a GPU, as the profiler sees them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return summarised(events_of(record))


def events_of(record: profile) -> list[Any]:
    """Kineto's own events: torch's, made from them, take seconds where there are thousands."""
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    return list(results.events())


def summarised(events: list[Any]) -> Json:
    """Counts of a profile's events.

    Args:
        events: Kineto's.

    Returns:
        "launches" (kernels, copies and fills), "waits" (without the one that ends the profile),
        "device_ms" (sum of the kernels' times) and "longest" kernels with milliseconds and calls.
    """
    launches = waits = 0
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        name = event.name()
        if event.device_type().name == "CUDA":
            # An annotation spans kernels that are counted themselves.
            if "#" in name or name.startswith(("ProfilerStep", "Optimizer.")):
                continue
            times[name] += event.duration_ns()
            calls[name] += 1
        elif LAUNCH.match(name):
            launches += 1
        elif WAIT.match(name):
            waits += 1
    longest = [
        {"kernel": name[:120], "ms": spent / 1e6, "calls": calls[name]}
        for name, spent in times.most_common(TOP)
    ]
    return {
        "launches": launches or sum(calls.values()),
        "kernels": sum(calls.values()),
        "waits": max(waits - 1, 0),
        "device_ms": sum(times.values()) / 1e6,
        "longest": longest,
    }


def host_waits(call: Call, root: Path) -> Json:
    """Where a call makes the host wait for the device, as torch's own check sees it.

    Args:
        call: what is checked.
        root: places are named below it.

    Returns:
        "synchronizing" (how many) and "places" (how often each).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{_below(entry.filename, root)}:{entry.lineno}"
        for entry in caught
        if "synchronizing" in str(entry.message)
    )
    return {"synchronizing": sum(places.values()), "places": dict(places.most_common(TOP))}


def _below(name: str, root: Path) -> str:
    """A file's name from the repository's root on, or its last parts."""
    parts = Path(name).parts
    if "lowrank" in parts:
        return "/".join(parts[parts.index("lowrank") :])
    try:
        return str(Path(name).relative_to(root))
    except ValueError:
        return "/".join(parts[-3:])


def graphed(call: Call) -> Call:
    """The call as a replay of its CUDA graph.

    Raises:
        RuntimeError: it can't be captured.
    """
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
