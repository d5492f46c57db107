"""Quantisation in groups with a scale and a zero point each: one code a byte.

A tensor is read as one flat row (row-major) and cut into groups of `group_size` entries; the last
one may be shorter. With L + 1 levels (L = 255 or 15), for each group

    s = max(max - min, 1e-5) * (1 / L),  z = round(-min / s) in 0..L,  q = round(x / s) + z in 0..L

and x is read back as s (q - z) (Q-GaLore, arXiv 2407.08296). Division by s is multiplication by its
rounded reciprocal, a tenth of the work on GPUs. Zero is forced into the group's range
(min <= 0 <= max), so that z needs no clipping and a group of one sign keeps its values: the
released code clips it. Groups that straddle zero, as nearly all do, are quantised as there. The
reciprocal of L is rounded to the precision of s: torch divides by a number in that way on GPUs, but
not on CPUs, where the released code's s may differ in the last bit.

With a seed q = floor(x / s + u) + z for u in [0, 1) from `noise.uniform`: unbiased stochastic
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .noise import Seed, signed_seed, uniform

DEFAULT_GROUP = 256
SMALLEST_RANGE = 1e-5
# Elements per chunk, as in `blockwise`.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22

Out = tuple[Tensor, Tensor, Tensor]


def group_count(numel: int, group_size: int = DEFAULT_GROUP) -> int:
    """Number of groups of `numel` entries, including a partial last one.

    Raises:
        ValueError: `group_size` is not positive.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; it must be 1 or more")
    return -(-numel // group_size)


def group_bytes(numel: int, bits: int, group_size: int, itemsize: int, per_group: int = 2) -> int:
    """Bytes of `numel` entries: codes of `bits` bits, and `per_group` numbers for each group.

    Args:
        numel: number of entries.
        bits: 4 (two codes a byte) or 8.
        group_size: entries that share a scale.
        itemsize: bytes of a scale.
        per_group: 2 for scale and zero point, 1 for a scale alone.
    """
    return -(-numel * bits // 8) + per_group * itemsize * group_count(numel, group_size)


def quantize_groups(
    x: Tensor,
    levels: int = 255,
    group_size: int = DEFAULT_GROUP,
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    first: int = 0,
    out: Out | None = None,
) -> Out:
    """Quantises a tensor.

    Args:
        x: any shape and floating dtype, contiguous or not (a non-contiguous one is copied).
        levels: the largest code, 255 or 15.
        group_size: entries that share a scale.
        dtype: of scales and zeros, that of `x` by default. A scale that it can't hold is rounded
            up, so that the range stays covered.
        seed: rounds stochastically when given.
        first: position of the first entry, for the noise.
        out: contiguous tensors to write to instead of making new ones.

    Returns:
        `codes`, uint8 of the shape of `x`; `scales` and `zeros`, one a group.

    Raises:
        ValueError: `x` is not floating or `group_size` is not positive.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be a floating dtype")
    if out is None:
        count = group_count(x.numel(), group_size)
        out = (
            torch.empty(x.shape, dtype=torch.uint8, device=x.device),
            torch.empty(count, dtype=dtype or x.dtype, device=x.device),
            torch.empty(count, dtype=dtype or x.dtype, device=x.device),
        )
    codes, scales, zeros = out
    flat = x.detach().reshape(-1)
    torch.ops.lowrank.quantize_groups(
        flat, codes.view(-1), scales, zeros, levels, group_size, signed_seed(seed), first
    )
    return out


def dequantize_groups(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int = DEFAULT_GROUP,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantises codes: s (q - z), rounded once.

    Args:
        codes: contiguous uint8 of any shape.
        scales: one a group.
        zeros: one a group.
        group_size: entries that share a scale.
        dtype: of the result, that of `scales` by default.
        out: contiguous tensor of the shape of `codes` to write to.

    Returns:
        A tensor of the shape of `codes`; `out` if it was given.
    """
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype or scales.dtype, device=codes.device)
    torch.ops.lowrank.dequantize_groups(codes.reshape(-1), scales, zeros, out.view(-1), group_size)
    return out


def quantize_flat(
    flat: Tensor,
    codes_n: Tensor,
    scales: Tensor,
    zeros: Tensor,
    levels: int,
    group_size: int,
    seed: Seed | None,
    first: int,
) -> None:
    """The reference of `torch.ops.lowrank.quantize_groups`; see `quantize_groups`."""
    for start, stop, width in spans(flat.numel(), group_size, flat.device):
        rows_gw = flat[start:stop].view(-1, width).to(_wide(flat.dtype))
        groups = slice(start // group_size, start // group_size + rows_gw.shape[0])
        scale_g, zero_g, inverse_g = affine_parameters(rows_gw, levels, scales.dtype)
        scales[groups].copy_(scale_g)
        zeros[groups].copy_(zero_g)
        codes_gw = rows_gw * inverse_g.unsqueeze(1)
        if seed is None:
            codes_gw.round_()
        else:
            noise = uniform(stop - start, seed, first + start, flat.device)
            codes_gw.add_(noise.view(codes_gw.shape)).floor_()
        codes_gw.add_(zero_g.unsqueeze(1)).clamp_(0, levels)
        codes_n[start:stop].copy_(codes_gw.view(-1))


def dequantize_flat(
    codes_n: Tensor, scales: Tensor, zeros: Tensor, out_n: Tensor, group_size: int
) -> None:
    """The reference of `torch.ops.lowrank.dequantize_groups`; see `dequantize_groups`."""
    compute = torch.promote_types(scales.dtype, out_n.dtype)
    scale_g1, zero_g1 = (t.to(compute).unsqueeze(1) for t in (scales, zeros))
    for start, stop, width in spans(codes_n.numel(), group_size, codes_n.device):
        first = start // group_size
        groups = slice(first, first + (stop - start) // width)
        rows_gw = out_n[start:stop].view(-1, width)
        # Codes and zeros are small integers, which every floating dtype here holds exactly.
        centred_gw = torch.sub(codes_n[start:stop].view(-1, width), zero_g1[groups])
        torch.mul(centred_gw, scale_g1[groups], out=rows_gw)


def dequantize_list(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    outs: list[Tensor],
    group_size: int,
) -> None:
    """The reference of `torch.ops.lowrank.dequantize_groups_list`: each as `dequantize_flat`."""
    for one in zip(codes, scales, zeros, outs, strict=True):
        dequantize_flat(*one, group_size)


def affine_parameters(rows_gw: Tensor, levels: int, dtype: torch.dtype) -> Out:
    """Scale (as `dtype` holds it), zero point and 1 / scale of each row, as precise as the rows."""
    low_g = rows_gw.amin(1).clamp_(max=0)
    high_g = rows_gw.amax(1).clamp_(min=0)
    # Times the reciprocal, as core/groups.h says.
    exact_g = (high_g - low_g).clamp_(min=SMALLEST_RANGE) * (1 / levels)
    scale_g = ceil_to(exact_g, dtype).to(rows_gw.dtype)
    inverse_g = scale_g.reciprocal()
    zero_g = torch.rsub((low_g * inverse_g).round_(), 0.0).clamp_(0, levels)
    return scale_g, zero_g, inverse_g


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale; 1 for scales so small that their entries are as good as zero (core/common.h)."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale.reciprocal())


def ceil_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are not below the positive `x`."""
    nearest = x.to(dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return nearest
    # The next number of a positive half-precision one has the next pattern.
    above = (nearest.view(torch.int16) + 1).view(dtype)
    return torch.where(nearest.to(x.dtype) < x, above, nearest)


def spans(numel: int, group_size: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Yields (start, stop, entries per group) of chunks of equal groups; the short one last."""
    if device.type == "meta":  # there is nothing to compute
        return
    step = chunk_elements(device, group_size)
    whole = numel - numel % group_size
    for start in range(0, whole, step):
        yield start, min(start + step, whole), group_size
    if whole < numel:
        yield whole, numel, numel - whole


def chunk_elements(device: torch.device, multiple: int) -> int:
    """Entries per chunk: a bounded number, divisible by `multiple`."""
    wanted = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    return max(1, wanted // multiple) * multiple


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
