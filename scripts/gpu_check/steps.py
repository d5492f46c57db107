"""One optimizer step on a model's parameters, without its refreshes."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank import optimizers
from lowrank.cuda import using_kernels

from .clock import Clock, graphed
from .record import Record
from .workload import Model

_NEVER = 1_000_000_000
_LEARNING_RATE = 1e-6


def parameters(model: Model, device: torch.device) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """bf16 (projected, plain) parameters with gradients."""

    def make(shape: tuple[int, ...]) -> nn.Parameter:
        weight = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02)
        weight.grad = torch.randn_like(weight) * 1e-3
        return weight

    return [make(s) for s in model.projected()], [make(s) for s in model.plain()]


def fused_adamw(model: Model, device: torch.device) -> Callable[[], Any]:
    """A step of torch's fused AdamW with bf16 moments."""
    projected, plain = parameters(model, device)
    capturable = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [*projected, *plain], lr=_LEARNING_RATE, fused=True, capturable=capturable
    )
    return optimizer.step


def ours(
    name: str, model: Model, device: torch.device, rank: int, **options: Any
) -> Callable[[], Any]:
    """A step of one of our classes, after one that has fitted the bases."""
    projected, plain = parameters(model, device)
    groups = [
        {"params": projected, "rank": rank, "update_proj_gap": _NEVER},
        {"params": plain},
    ]
    settings = {"refresh": "randomized", "rotate": False} | options
    optimizer = getattr(optimizers, name)(groups, lr=_LEARNING_RATE, **settings)
    optimizer.step()
    step: Callable[[], Any] = optimizer.step
    return step


def floor(model: Model, rank: int, bytes_ms: float, flops_ms: float) -> float:
    """Milliseconds of GaLore's products and of the bytes that it has to move, one after the other.

    Per projected entry G is read and W read and written (6 bytes); per projected low entry the
    gradient and the delta are written and read, the moments read and written (16); per plain entry
    14.
    """
    work = sum(4.0 * m * n * min(rank, m, n) for m, n in model.projected())
    dense = sum(m * n for m, n in model.projected())
    low = sum(max(m, n) * min(rank, m, n) for m, n in model.projected())
    plain = sum(torch.Size(shape).numel() for shape in model.plain())
    return work / flops_ms + (6.0 * dense + 16.0 * low + 14.0 * plain) / bytes_ms


def gemm_rate(clock: Clock, side: int) -> float:
    """Floating-point operations a millisecond of a bf16 GEMM."""
    left = torch.randn(side, side, device=clock.device).bfloat16()
    out = torch.empty_like(left)
    return 2.0 * side**3 / clock.measure(lambda: torch.mm(left, left, out=out)).median


def run(
    record: Record,
    clock: Clock,
    name: str,
    model: Model,
    bytes_ms: float,
    flops_ms: float,
) -> None:
    """Times steps of a model as CUDA graphs, and as they are called."""
    section = f"step {name}, rank {model.rank}, bf16"
    capture = {"capturable": clock.device.type == "cuda"}
    least = floor(model, model.rank, bytes_ms, flops_ms)
    record.add(section, "floor of GaLore", least, "ms", note="from this card's copy and GEMM rates")

    medians: dict[str, float] = {}

    def time(label: str, make: Callable[[], Callable[[], Any]], graph: bool) -> None:
        if clock.left() < 30:
            record.skipped.append(f"{section}: {label}")
            return
        step = make()
        call = graphed(clock.device, step) if graph else step
        timing = clock.measure(call, most=20, seconds=2.0)
        del step, call
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        medians[label] = timing.median
        adamw = medians.get("AdamW fused, graph")
        parts = [f"{timing.median / least:.2f} x floor"]
        if adamw:
            parts.append(f"{timing.median / adamw:.2f} x fused AdamW")
        record.add(section, label, timing.median, "ms", aim=aim(label), note=", ".join(parts))

    def aim(label: str) -> float | None:
        adamw, galore = medians.get("AdamW fused, graph"), medians.get("GaLore, graph")
        if label == "GaLore, graph":
            if name == "60m" and adamw is not None:
                return 2.0 * adamw
            return 8.0 if name == "1b" else 1.25 * least
        if label == "Fira, graph" and galore is not None:
            return 1.1 * galore
        if label.startswith("GaLore, rank m/16") and adamw is not None:
            return adamw
        return None

    device, rank = clock.device, model.rank
    small = max(1, model.hidden // 16)
    time("AdamW fused, graph", lambda: fused_adamw(model, device), True)
    for label, method, options in (
        ("GaLore", "GaLoreAdamW", capture),
        ("Fira", "FiraAdamW", capture),
        ("GaLore, 8-bit moments", "GaLoreAdamW8bit", None),
    ):
        make = functools.partial(ours, method, model, device, rank)
        if options is not None:
            time(f"{label}, graph", functools.partial(make, **options), True)
        time(f"{label}, eager", make, False)
    time(
        f"GaLore, rank m/16 = {small}, graph",
        lambda: ours("GaLoreAdamW", model, device, small, **capture),
        True,
    )
    time(
        "GaLore, stochastic rounding, eager",
        lambda: ours("GaLoreAdamW", model, device, rank, stochastic_rounding=True),
        False,
    )
    with using_kernels("torch"):
        time("GaLore, eager, pure torch", lambda: ours("GaLoreAdamW", model, device, rank), False)
