"""Compiled quantisation, signs and rounding: tensors in, a call through the C interface.

Each function takes the operation's arguments and returns whether it ran: False if the library is
missing, kernels are switched off, or the types are not supported, so that the reference in plain
torch runs instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import (
    MASK64,
    addresses,
    alike,
    dtype_code,
    expect,
    expect_groups,
    int64s,
    pointer,
    usable,
)
from .blockwise import dynamic_map, rank_table
from .groups import group_count
from .int4 import MIDRISE_SHARE, nf4_values

_FORMATS = {"asymmetric": 0, "midrise": 1, "nf4": 2}
#: Scales, as shares of a group's range.
_SHARES = {"asymmetric": 1 / 15, "midrise": MIDRISE_SHARE, "nf4": 1.0}
_SIGNED_ZERO = 127


def quantize_blockwise(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int) -> bool:
    """See `blockwise.quantize_flat`."""
    library = usable(x, codes, absmax)
    if library is None:
        return False
    expect("codes", codes, x.numel(), torch.uint8)
    expect("absmax", absmax, group_count(x.numel(), block), torch.float32)
    table = rank_table(signed, x.device)
    library.call(
        "quantize_blockwise",
        x.device,
        *(x.data_ptr(), dtype_code(x), codes.data_ptr(), absmax.data_ptr(), x.numel(), block),
        *(table.data_ptr(), _SIGNED_ZERO if signed else 0),
    )
    return True


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, out: Tensor, signed: bool, block: int
) -> bool:
    """See `blockwise.dequantize_flat`."""
    library = usable(codes, absmax, out)
    if library is None:
        return False
    expect("codes", codes, out.numel(), torch.uint8)
    expect("absmax", absmax, group_count(out.numel(), block), torch.float32)
    values = dynamic_map(signed, out.device)
    library.call(
        "dequantize_blockwise",
        out.device,
        *(codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), dtype_code(out)),
        *(out.numel(), block, values.data_ptr()),
    )
    return True


def quantize_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    levels: int,
    group_size: int,
    seed: int | None,
    first: int,
) -> bool:
    """See `groups.quantize_flat`."""
    library = usable(x, codes, scales, zeros)
    if library is None:
        return False
    expect("codes", codes, x.numel(), torch.uint8)
    expect_groups(scales, zeros, x.numel(), group_size)
    library.call(
        "quantize_groups",
        x.device,
        *(x.data_ptr(), dtype_code(x), codes.data_ptr(), scales.data_ptr(), zeros.data_ptr()),
        *(dtype_code(scales), x.numel(), group_size, levels, int(seed is not None)),
        *((seed or 0) & MASK64, first & MASK64),
    )
    return True


def dequantize_groups(
    codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor, group_size: int
) -> bool:
    """See `groups.dequantize_flat`."""
    library = usable(codes, scales, zeros, out)
    if library is None:
        return False
    expect("codes", codes, out.numel(), torch.uint8)
    expect_groups(scales, zeros, out.numel(), group_size)
    library.call(
        "dequantize_groups",
        out.device,
        *(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), dtype_code(scales)),
        *(out.data_ptr(), dtype_code(out), out.numel(), group_size),
    )
    return True


def dequantize_groups_list(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    outs: list[Tensor],
    group_size: int,
) -> bool:
    """See `groups.dequantize_list`."""
    library = usable(*codes, *scales, *zeros, *outs)
    if library is None or not (alike([*scales, *zeros]) and alike(outs)):
        return False
    for own, scale, zero, out in zip(codes, scales, zeros, outs, strict=True):
        expect("codes", own, out.numel(), torch.uint8)
        expect_groups(scale, zero, out.numel(), group_size)
    library.call(
        "dequantize_groups_list",
        outs[0].device,
        *(len(outs), addresses(codes), addresses(scales), addresses(zeros), dtype_code(scales[0])),
        *(addresses(outs), int64s([out.numel() for out in outs]), dtype_code(outs[0]), group_size),
    )
    return True


def quantize_int4(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: str, group_size: int
) -> bool:
    """See `int4.quantize_flat`; an odd group size, whose groups share bytes, is left to it."""
    library = None if group_size % 2 else usable(x, codes, scales, zeros)
    if library is None:
        return False
    expect("codes", codes, -(-x.numel() // 2), torch.uint8)
    expect_groups(scales, zeros, x.numel(), group_size)
    library.call(
        "quantize_int4",
        x.device,
        *(x.data_ptr(), dtype_code(x), codes.data_ptr(), scales.data_ptr(), pointer(zeros)),
        *(dtype_code(scales), x.numel(), group_size, _FORMATS[format]),
        *(_SHARES[format], nf4_values(x.device).data_ptr()),
    )
    return True


def dequantize_int4(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, format: str, group_size: int
) -> bool:
    """See `int4.dequantize_flat`."""
    library = None if group_size % 2 else usable(codes, scales, zeros, out)
    if library is None:
        return False
    expect("codes", codes, -(-out.numel() // 2), torch.uint8)
    expect_groups(scales, zeros, out.numel(), group_size)
    library.call(
        "dequantize_int4",
        out.device,
        *(codes.data_ptr(), scales.data_ptr(), pointer(zeros), dtype_code(scales)),
        *(out.data_ptr(), dtype_code(out), out.numel(), group_size),
        *(_FORMATS[format], nf4_values(out.device).data_ptr()),
    )
    return True


def dequantize_int4_list(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    outs: list[Tensor],
    format: str,
    group_size: int,
) -> bool:
    """See `int4.dequantize_list`."""
    library = None if group_size % 2 else usable(*codes, *scales, *zeros, *outs)
    if library is None or not (alike([*scales, *zeros]) and alike(outs)):
        return False
    each: list[Tensor] | list[None] = zeros or [None] * len(outs)
    for own, scale, zero, out in zip(codes, scales, each, outs, strict=True):
        expect("codes", own, -(-out.numel() // 2), torch.uint8)
        expect_groups(scale, zero, out.numel(), group_size)
    library.call(
        "dequantize_int4_list",
        outs[0].device,
        *(len(outs), addresses(codes), addresses(scales), addresses(zeros) if zeros else None),
        *(dtype_code(scales[0]), addresses(outs), int64s([out.numel() for out in outs])),
        *(dtype_code(outs[0]), group_size, _FORMATS[format], nf4_values(outs[0].device).data_ptr()),
    )
    return True


def rademacher(out: Tensor, seed: int) -> bool:
    """See `sketch.fill_flat`."""
    library = usable(out)
    if library is None:
        return False
    library.call(
        "rademacher",
        out.device,
        *(out.data_ptr(), dtype_code(out), out.numel(), seed & MASK64),
    )
    return True


def gaussian(out: Tensor, seed: int, device_seed: Tensor | None, first: int) -> bool:
    """See `normal.fill_flat`."""
    library = usable(out, device_seed)
    if library is None:
        return False
    expect("device_seed", device_seed, 1, torch.int64)
    library.call(
        "gaussian",
        out.device,
        *(out.data_ptr(), dtype_code(out), out.numel(), seed & MASK64),
        *(pointer(device_seed), first & MASK64),
    )
    return True


def gaussian_list(
    outs: list[Tensor], seeds: list[int], device_seeds: list[Tensor], scale: float
) -> bool:
    """See `normal.fill_list`."""
    library = usable(*outs, *device_seeds)
    if library is None or not alike(outs):
        return False
    for seed in device_seeds:
        expect("device_seeds", seed, 1, torch.int64)
    if len(device_seeds or seeds) != len(outs):
        raise ValueError(f"{len(outs)} tensors have {len(device_seeds or seeds)} seeds")
    library.call(
        "gaussian_list",
        outs[0].device,
        *(len(outs), addresses(outs), int64s([out.numel() for out in outs])),
        *(None, addresses(device_seeds)) if device_seeds else (int64s(seeds), None),
        *(dtype_code(outs[0]), scale),
    )
    return True


def step_seeds(steps: list[Tensor], states: list[int], purpose: int, seeds: Tensor) -> bool:
    """See `noise.fill_step_seeds`."""
    library = usable(*steps, seeds)
    if library is None or {step.dtype for step in steps} != {torch.float32}:
        return False
    for step in steps:
        expect("steps", step, 1)
    if len(states) != len(steps):
        raise ValueError(f"{len(steps)} step counts have {len(states)} states")
    expect("seeds", seeds, len(steps), torch.int64)
    library.call(
        "step_seeds",
        seeds.device,
        *(len(steps), addresses(steps), int64s(states), purpose & MASK64, seeds.data_ptr()),
    )
    return True


def stochastic_bfloat16(
    x: Tensor, out: Tensor, seed: int, first: int, device_seed: Tensor | None = None
) -> bool:
    """See `noise.stochastic_flat`."""
    library = usable(x, out, device_seed)
    if library is None or x.dtype != torch.float32:
        return False
    expect("out", out, x.numel(), torch.bfloat16)
    expect("device_seed", device_seed, 1, torch.int64)
    library.call(
        "stochastic_bfloat16",
        x.device,
        *(x.data_ptr(), out.data_ptr(), x.numel(), seed & MASK64, first & MASK64),
        pointer(device_seed),
    )
    return True
