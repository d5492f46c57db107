"""gpu-check: what only a GPU's run does, with a stand-in for torch.cuda."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import on_gpu, part
from support import ROOT


def record(file: Path, section: str = "some") -> Any:
    return part("record").Record(section, file, {})


def test_rates_tell_of_the_card(gpu: SimpleNamespace, file: Path) -> None:
    found = record(file)
    part("rates").run(found, on_gpu())
    assert found.errors == []
    assert found.facts["device"] == "NVIDIA H100 80GB HBM3"
    aims = {row.name: row.aim for row in found.rows if row.aim is not None}
    assert aims == pytest.approx({"copy": 0.85 * 3.35, "bf16 GEMM": 0.7 * 989})
    assert found.value("rate", "tf32 GEMM") is not None


def test_steps_count_launches_and_waits_and_have_aims(gpu: SimpleNamespace, file: Path) -> None:
    found, context = record(file), on_gpu()
    steps = part("steps").Steps(found, context)
    model = context.size.models["60m"]
    method = part("methods").CORE[1]
    found.attempt("eager", lambda: steps._eager(model, method))
    assert found.errors == []
    (row,) = found.rows
    assert row.aim == pytest.approx(1.25 * row.details["floor_ms"])
    assert gpu.modes == ["warn", "default"]
    for name in ("launches", "waits", "device_ms", "synchronizing", "places", "longest"):
        assert name in row.details
    assert "0 waits" in row.note


def test_steps_are_captured(gpu: SimpleNamespace, file: Path) -> None:
    found, context = record(file), on_gpu()
    steps = part("steps").Steps(found, context)
    model = context.size.models["60m"]
    for method in part("methods").CORE[1:4]:
        found.attempt(method.label, lambda method=method: steps._graph(model, method))
    assert found.errors == []
    assert {row.name for row in found.rows} >= {"galore_adamw, graph", "fira_adamw, graph"}
    assert len(found.rows) + len(found.skipped) == 3


def test_what_can_not_be_captured_is_skipped_with_its_reason(
    gpu: SimpleNamespace, file: Path
) -> None:
    found, context = record(file), on_gpu()
    methods = part("methods")
    method = methods.Method("adafactor", "adafactor", methods.Work(), capturable=True)
    steps = part("steps").Steps(found, context)
    found.attempt("graph", lambda: steps._graph(context.size.models["60m"], method))
    assert found.errors == []
    (entry,) = found.skipped
    assert "capturable=True" in entry["why"]


@pytest.mark.parametrize("name", ["steps", "memory"])
def test_a_small_card_skips_what_does_not_fit(gpu: SimpleNamespace, file: Path, name: str) -> None:
    gpu.free = 1 << 20
    found = record(file)
    part(name).run(found, on_gpu())
    assert found.errors == []
    assert found.rows == []
    assert all("GB are free" in entry["why"] for entry in found.skipped)
    assert len(found.skipped) > 10


def test_peaks_are_above_what_was_there_before(gpu: SimpleNamespace) -> None:
    meter = part("memory").Meter(torch.device("cuda"))
    with meter:
        assert meter.phase("model", lambda: 3) == 3
    assert (meter.peaks, meter.ends) == ({"model": 4000}, {"model": 0})


def test_peaks_on_a_cpu_are_those_of_its_allocations() -> None:
    meter = part("memory").Meter(torch.device("cpu"))
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.append(torch.zeros(1000))
        torch.zeros(5000)  # gone at once

    with meter:
        meter.phase("first", work)
        meter.phase("second", lambda: kept.append(torch.zeros(2000)))
    assert meter.ends == {"first": 4000, "second": 12000}
    assert meter.peaks == {"first": 24000, "second": 12000}
    assert meter.scratch("second", "first") == 8000


def test_a_full_card_at_the_start_is_no_success(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    section = part("section")

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(section, "Clock", full)
    monkeypatch.setattr(section, "_die_with_parent", lambda: None)
    given = ["--root", str(ROOT), "--file", str(file), "--device", "cpu", "--size", "tiny"]
    threads = torch.get_num_threads()
    section.main(["kernels", *given, "--seconds", "9"])
    torch.set_num_threads(threads)
    found = json.loads(file.read_text())
    assert found["state"] == "broken"
    assert part("summary").failures({"kernels": found})


def test_a_lost_device_ends_the_process_but_not_the_section(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    found = record(file)
    module = part("record")
    monkeypatch.setattr(module, "_uses_cuda", lambda: True)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(module.DeviceLost, match="illegal memory access"):
        found.attempt("bad kernel", lost)
    content = json.loads(file.read_text())
    assert content["errors"][0]["where"] == "bad kernel"
    assert content["done"] == ["bad kernel"]  # so the next process goes on behind it


# Traces


def event(name: str, device: str, nanoseconds: int = 0) -> Any:
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: SimpleNamespace(name=device),
        duration_ns=lambda: nanoseconds,
    )


def test_events_are_counted_by_kind() -> None:
    found = part("tracing").summarised(
        [
            event("cudaLaunchKernel", "CPU", 9),
            event("cuLaunchKernelEx", "CPU", 9),
            event("cudaMemcpyAsync", "CPU", 9),
            event("cudaMalloc", "CPU", 9),
            event("cudaStreamSynchronize", "CPU", 9),
            event("cudaDeviceSynchronize", "CPU", 9),
            event("Optimizer.step#GaLoreAdamW.step", "CUDA", 5_000_000),
            event("adam_kernel", "CUDA", 1_000_000),
            event("adam_kernel", "CUDA", 2_000_000),
            event("Memcpy DtoH", "CUDA", 500_000),
        ]
    )
    assert (found["launches"], found["waits"], found["kernels"]) == (3, 1, 3)
    assert found["device_ms"] == pytest.approx(3.5)
    assert found["longest"][0] == {"kernel": "adam_kernel", "ms": 3.0, "calls": 2}


def test_real_events_have_what_is_read() -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        torch.ones(3).sum()
    events = part("tracing").events_of(made)
    assert {one.device_type().name for one in events} == {"CPU"}
    assert part("tracing").summarised(events)["launches"] == 0
    assert all(isinstance(one.start_ns() + one.duration_ns(), int) for one in events)


def test_operations_and_reads_of_the_host_are_counted() -> None:
    x = torch.ones(3)
    found = part("tracing").operations(lambda: float(x.add_(1).sum()))
    assert (found["operations"], found["host_reads"]) == (3, 1)


def test_waits_are_found_where_they_are(gpu: SimpleNamespace) -> None:
    import warnings

    def waits() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = part("tracing").host_waits(waits, ROOT)
    assert found["synchronizing"] == 2
    (place,) = found["places"]
    assert place.startswith("tests/gpu/test_devices.py:")
