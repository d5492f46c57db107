"""Stand-ins for torch.cuda, so that a CPU runs the lines that are for a GPU."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ROOT


def part(name: str) -> Any:
    """A module of gpu-check."""
    return importlib.import_module(f"gpu_check.{name}")


class Graph:
    """Replays the last call of its capture."""

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda's functions that sections call, computing nothing; what is free can be set."""
    state = SimpleNamespace(free=1 << 40, modes=[])
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        total_memory=80 << 30,
        multi_processor_count=132,
        major=9,
        minor=0,
    )
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "synchronize": lambda *device: None,
        "mem_get_info": lambda *device: (state.free, 80 << 30),
        "memory_allocated": lambda *device: 1000,
        "max_memory_allocated": lambda *device: 5000,
        "reset_peak_memory_stats": lambda *device: None,
        "set_sync_debug_mode": state.modes.append,
        "get_device_properties": lambda index: properties,
        "get_device_capability": lambda *device: (9, 0),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda which: contextlib.nullcontext(),
        "graph": lambda which: contextlib.nullcontext(),
        "CUDAGraph": Graph,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    cpu = SimpleNamespace(CUDA=torch.profiler.ProfilerActivity.CPU)
    monkeypatch.setattr(part("tracing"), "ProfilerActivity", cpu)
    monkeypatch.setattr(part("record"), "release", lambda: None)
    return state


def on_gpu(rates: Any = None) -> Any:
    """A context that takes the CPU for a GPU."""
    section = part("section")
    kind = type("OnGpu", (section.Context,), {"on_gpu": True})
    clock = part("clock").Clock(torch.device("cpu"), 100.0)
    rates = rates or section.Rates(copy=1e7, bf16=1e8, fp32=1e8)
    return kind(ROOT, clock, part("workload").SIZES["tiny"], rates)


def context(seconds: float = 100.0, size: str = "tiny") -> Any:
    """A context on this machine's CPU."""
    section = part("section")
    clock = part("clock").Clock(torch.device("cpu"), seconds)
    rates = section.Rates(copy=1e7, bf16=1e8, fp32=1e8)
    return section.Context(ROOT, clock, part("workload").SIZES[size], rates)


def ran(name: str, file: Path, about: Any = None) -> Any:
    """The record of a section that ended without errors."""
    record = part("record").Record(name, file, {})
    part("section").run(name, record, about or context())
    assert record.errors == []
    return record
