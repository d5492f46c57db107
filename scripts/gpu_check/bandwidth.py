"""Kernels that move bytes, against the card's copy bandwidth."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from lowrank.cuda import blockwise, dynamic_map, groups, int4, rademacher

from .clock import Clock
from .record import Record

SECTION = "bandwidth"
#: What must reach 80 % of copy bandwidth.
HELD = ("int4 pack", "int4 unpack", "int8 requantise", "weight + stochastic bf16")


def copy_rate(clock: Clock, numel: int) -> float:
    """Bytes a millisecond of a copy, read and written."""
    source = torch.ones(numel, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    return 4.0 * numel / clock.measure(lambda: target.copy_(source)).median


def calls(numel: int, device: torch.device) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Name to (bytes an entry, call) of each kernel."""
    rows = numel // 1024
    wide = torch.randn(numel, device=device)
    half = wide.bfloat16()
    weight = half.view(rows, 1024).clone()
    delta = torch.randn_like(weight)
    codes8, absmax = blockwise.quantize_blockwise(wide, True)
    affine = groups.quantize_groups(half)
    packed = {name: int4.quantize_int4(half, name) for name in int4.FORMATS}
    m, v, out = (torch.zeros_like(weight) for _ in range(3))
    m32, v32 = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
    m8, m_scale = blockwise.quantize_blockwise(m32, True)
    v8, v_scale = blockwise.quantize_blockwise(v32, False)
    norms = [torch.empty(1024, device=device) for _ in range(2)]
    ops = torch.ops.lowrank
    numbers = (0.9, 0.999, 1e-8, 1e-3, None)
    return {
        "blockwise quantise fp32": (
            5.0,
            lambda: blockwise.quantize_blockwise(wide, True, out=(codes8, absmax)),
        ),
        "blockwise dequantise fp32": (
            5.0,
            lambda: blockwise.dequantize_blockwise(codes8, absmax, True, out=wide),
        ),
        "int8 quantise bf16": (3.0, lambda: groups.quantize_groups(half, out=affine)),
        "int8 dequantise bf16": (3.0, lambda: groups.dequantize_groups(*affine, out=half)),
        "int4 pack": (2.5, lambda: int4.quantize_int4(half, out=packed["asymmetric"])),
        "int4 pack, mid-rise": (
            2.5,
            lambda: int4.quantize_int4(half, "midrise", out=packed["midrise"]),
        ),
        "int4 pack, NF4": (2.5, lambda: int4.quantize_int4(half, "nf4", out=packed["nf4"])),
        "int4 unpack": (2.5, lambda: int4.dequantize_int4(packed["asymmetric"], numel)),
        "int4 unpack, NF4": (2.5, lambda: int4.dequantize_int4(packed["nf4"], numel, "nf4")),
        "int8 requantise": (
            4.0,
            lambda: ops.write_back_int8(
                *(affine[0].view(rows, 1024), affine[1], affine[2], delta, None, None),
                *(256, 1.0, 1e-3, 7, 0),
            ),
        ),
        "weight + stochastic bf16": (
            6.0,
            lambda: ops.write_back(weight, delta, None, None, 1.0, 1e-3, 7, 0),
        ),
        "signs": (2.0, lambda: rademacher((numel,), 7, torch.bfloat16, device)),
        "Adam bf16": (
            12.0,
            lambda: ops.adam([weight], [m], [v], [out], [], [], -1, *numbers),
        ),
        "Adam bf16, norms of columns": (
            12.0,
            lambda: ops.adam([weight], [m], [v], [out], [norms[0]], [norms[1]], 0, *numbers),
        ),
        "Adam, fp32 moments": (
            20.0,
            lambda: ops.adam([weight], [m32], [v32], [out], [], [], -1, *numbers),
        ),
        "Adam, 8-bit moments": (
            8.0,
            lambda: ops.adam_8bit([weight], [m8], [m_scale], [v8], [v_scale], [out], *numbers),
        ),
    }


def bitsandbytes_calls(
    numel: int, device: torch.device
) -> dict[str, tuple[float, Callable[[], Any]]]:
    """The same of bitsandbytes, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes import functional

    wide = torch.randn(numel, device=device)
    code = dynamic_map(True, device)
    codes, state = functional.quantize_blockwise(wide, code=code, blocksize=256)
    return {
        "bitsandbytes: blockwise quantise fp32": (
            5.0,
            lambda: functional.quantize_blockwise(wide, code=code, blocksize=256),
        ),
        "bitsandbytes: blockwise dequantise fp32": (
            5.0,
            lambda: functional.dequantize_blockwise(codes, state),
        ),
    }


def run(record: Record, clock: Clock, numel: int) -> float:
    """Times all of them; returns the copy rate in bytes a millisecond."""
    rate = copy_rate(clock, numel)
    record.add(SECTION, "copy", rate / 1e9, "TB/s", note=f"{numel} bf16 entries")
    found = calls(numel, clock.device) | bitsandbytes_calls(numel, clock.device)
    for name, (size, call) in found.items():
        timing = clock.measure(call, most=20, seconds=1.0)
        share = size * numel / timing.median / rate
        aim = 0.8 if name in HELD else None
        note = f"{timing.median:.3f} ms, {size:g} bytes an entry"
        record.add(SECTION, name, share, "of copy", aim=aim, at_least=True, note=note)
    return rate
