"""What the machine is, and what it can do at best: every ratio is to these rates."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from .clock import Clock
from .files import Json
from .record import Record
from .section import Context

LAUNCH = "a small operation, host included"
#: Dense bf16 TFLOP/s and TB/s that cards are sold with.
PUBLISHED = {"H100": (989.0, 3.35), "H200": (989.0, 4.8), "A100": (312.0, 2.04)}
#: Shares of those that a card in good order reaches.
IN_ORDER = (0.7, 0.85)


def run(record: Record, context: Context) -> None:
    """Measures copies and matrix products."""
    record.facts |= machine(context)
    record.save()
    clock, size = context.clock, context.size
    least = published(record.facts["device"])

    def copy() -> None:
        rate = copy_rate(clock, size.copy_numel)
        note = f"{size.copy_numel} bf16 entries, read and written"
        record.add("rate", "copy", rate / 1e9, "TB/s", aim=least[1], at_least=True, note=note)

    def gemm(name: str, dtype: torch.dtype, side: int, tf32: bool = False) -> None:
        rate = gemm_rate(clock, side, dtype, tf32=tf32)
        aim = least[0] if name == "bf16" else None
        note = f"{side}^3"
        record.add("rate", f"{name} GEMM", rate / 1e9, "TFLOP/s", aim=aim, at_least=True, note=note)

    side = size.gemm_side
    record.attempt("copy", copy)
    record.attempt("bf16", lambda: gemm("bf16", torch.bfloat16, side))
    record.attempt("fp32", lambda: gemm("fp32", torch.float32, side // 2))
    if context.on_gpu:
        record.attempt("tf32", lambda: gemm("tf32", torch.float32, side, tf32=True))
    record.attempt("fp64", lambda: gemm("fp64", torch.float64, side // 4))
    rows = {"copy": "copy"} | {name: f"{name} GEMM" for name in ("bf16", "fp32", "tf32", "fp64")}
    rates = {key: (record.value("rate", name) or 0.0) * 1e9 for key, name in rows.items()}
    record.facts["rates"] = rates
    record.attempt("launch", lambda: _launch(record, context))
    rates["launch"] = 1e-3 * (record.value("rate", LAUNCH) or 0.0)
    record.save()


def copy_rate(clock: Clock, numel: int) -> float:
    """Bytes a millisecond of a copy, read and written."""
    source = torch.randn(numel, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    return 4.0 * numel / clock.measure(lambda: target.copy_(source)).median


def gemm_rate(clock: Clock, side: int, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Floating-point operations a millisecond of a square matrix product of random numbers."""
    left = torch.randn(side, side, device=clock.device).to(dtype)
    out = torch.empty_like(left)
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        timing = clock.measure(lambda: torch.mm(left, left, out=out), most=10)
    finally:
        torch.set_float32_matmul_precision(former)
    return 2.0 * side**3 / timing.median


def _launch(record: Record, context: Context) -> None:
    """What a launch costs the host: many steps are bound by it."""
    x = torch.zeros(1, device=context.device)
    timing = context.clock.measure(lambda: [x.add_(1) for _ in range(1000)], most=5)
    record.add("rate", LAUNCH, timing.median, "us")


def machine(context: Context) -> Json:
    """Card, driver, versions and what of the tests' needs is there."""
    facts: Json = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
        "cores": os.cpu_count(),
        "host": _cpu(),
    }
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": [properties.major, properties.minor],
            "driver": _nvidia_smi(),
        }
    return facts


def published(device: str) -> tuple[float | None, float | None]:
    """TFLOP/s and TB/s that a known card reaches when nothing holds it back."""
    for card, (flops, moved) in PUBLISHED.items():
        if card in device:
            return IN_ORDER[0] * flops, IN_ORDER[1] * moved
    return None, None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "")


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [
        program,
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip()
