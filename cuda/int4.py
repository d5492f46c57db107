"""Four-bit quantisation in groups, two codes a byte.

Three formats, each with groups of the flattened tensor (the last one may be shorter):

- "asymmetric": `groups.quantize_groups` with 16 levels (Q-GaLore, arXiv 2407.08296), a scale and a
  zero point a group.
- "midrise": x = s (q - 7.5) with s = 0.85 max|x| / 7.5. The largest entries are clipped, which
  costs less than it saves on the others; a scale alone, half the asymmetric format's overhead.
- "nf4": x = s t_q with s = max|x| and t the 16 quantiles of a normal distribution of QLoRA (arXiv
  2305.14314); a scale alone.

On entries that are nearly normal, as those of a singular basis are, the relative errors with groups
of 256 are about 0.109, 0.106 and 0.099.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import DEFAULT_GROUP, ceil_to, chunk_elements, group_count, reciprocal, spans
from .groups import quantize_flat as affine_flat

FORMATS = ("asymmetric", "midrise", "nf4")
MIDRISE_CLIP = 0.85
_MIDDLE = 7.5
MIDRISE_SHARE = MIDRISE_CLIP / _MIDDLE  # scale of the format, as a share of max|x|
# QLoRA's offset: the tail probability of the outermost quantiles.
_NF4_OFFSET = 0.9677083


class Packed(NamedTuple):
    """A quantised tensor.

    Attributes:
        codes: uint8 (ceil(numel / 2),): entry 2 i in the lower half of byte i, 2 i + 1 in the
            upper.
        scales: one a group.
        zeros: one a group; None in the symmetric formats.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def pack(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """Puts two codes into each byte.

    Args:
        codes: uint8 (n,), each below 16; n may be odd.
        out: uint8 (ceil(n / 2),) to write to.

    Returns:
        uint8 (ceil(n / 2),); the last upper half is 0 where n is odd.
    """
    if out is None:
        out = torch.empty(-(-codes.numel() // 2), dtype=torch.uint8, device=codes.device)
    pairs = codes.numel() // 2
    torch.bitwise_left_shift(codes[1::2], 4, out=out[:pairs])
    out[:pairs].bitwise_or_(codes[: 2 * pairs : 2])
    if codes.numel() % 2:
        out[pairs:].copy_(codes[-1:])
    return out


def unpack(packed: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """Unpacks `count` codes.

    Args:
        packed: uint8 (ceil(count / 2),).
        count: number of codes.
        out: uint8 (count,) to write to.
    """
    if out is None:
        out = torch.empty(count, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=out[::2])
    torch.bitwise_right_shift(packed[: count // 2], 4, out=out[1::2])
    return out


def quantize_int4(
    x: Tensor,
    format: str = "asymmetric",
    group_size: int = DEFAULT_GROUP,
    *,
    dtype: torch.dtype | None = None,
    out: Packed | None = None,
) -> Packed:
    """Quantises a tensor, read row by row, to the nearest codes.

    Args:
        x: any shape and floating dtype.
        format: one of `FORMATS`.
        group_size: entries that share a scale.
        dtype: of scales and zeros, that of `x` by default.
        out: tensors to write to instead of new ones.

    Raises:
        ValueError: `x` is not floating, or `format` or `group_size` is not accepted.
    """
    _check_format(format)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be a floating dtype")
    if out is None:
        out = empty_int4(x.numel(), format, group_size, dtype or x.dtype, x.device)
    codes, scales, zeros = out
    flat = x.detach().reshape(-1)
    torch.ops.lowrank.quantize_int4(flat, codes, scales, zeros, format, group_size)
    return out


def dequantize_int4(
    packed: Packed,
    numel: int,
    format: str = "asymmetric",
    group_size: int = DEFAULT_GROUP,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Turns codes back into numbers.

    Args:
        packed: the result of `quantize_int4`.
        numel: number of entries.
        format: as it was quantised.
        group_size: as it was quantised.
        dtype: of the result, that of the scales by default.

    Returns:
        A flat tensor of `numel` entries.
    """
    _check_format(format)
    out = torch.empty(numel, dtype=dtype or packed.scales.dtype, device=packed.codes.device)
    torch.ops.lowrank.dequantize_int4(*packed, out, format, group_size)
    return out


def quantize_flat(
    flat: Tensor,
    codes_n: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    group_size: int,
) -> None:
    """The reference of `torch.ops.lowrank.quantize_int4`; see `quantize_int4`."""
    step = chunk_elements(flat.device, 2 * group_size)
    scratch = torch.empty(min(step, flat.numel()), dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        codes = scratch[: chunk.numel()]
        first = start // group_size
        groups = slice(first, first + group_count(chunk.numel(), group_size))
        if zeros is None:
            _quantize_symmetric(chunk, format, group_size, codes, scales[groups])
        else:
            affine_flat(chunk, codes, scales[groups], zeros[groups], 15, group_size, None, 0)
        pack(codes, out=codes_n[start // 2 : (start + chunk.numel() + 1) // 2])


def dequantize_flat(
    codes_n: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_n: Tensor,
    format: str,
    group_size: int,
) -> None:
    """The reference of `torch.ops.lowrank.dequantize_int4`; see `dequantize_int4`."""
    device, numel = codes_n.device, out_n.numel()
    compute = torch.promote_types(scales.dtype, out_n.dtype)
    scale_g1 = scales.to(compute).unsqueeze(1)
    zero_g1 = None if zeros is None else zeros.to(compute).unsqueeze(1)
    # Both products are made in fp32 at least and rounded once.
    wide = torch.promote_types(compute, torch.float32)
    values = nf4_values(device).to(wide) if format == "nf4" else None
    step = chunk_elements(device, 2 * group_size)
    for start in range(0, numel, step):
        size = min(step, numel - start)
        codes = unpack(codes_n[start // 2 : (start + size + 1) // 2], size)
        for begin, end, width in spans(size, group_size, device):
            first = (start + begin) // group_size
            groups = slice(first, first + (end - begin) // width)
            codes_gw = codes[begin:end].view(-1, width)
            if values is not None:
                units_gw = values[codes_gw.int()]
            elif zero_g1 is not None:
                units_gw = torch.sub(codes_gw, zero_g1[groups])
            else:
                units_gw = codes_gw.to(compute).sub_(_MIDDLE)
            rows_gw = out_n[start + begin : start + end].view(-1, width)
            torch.mul(units_gw, scale_g1[groups], out=rows_gw)


def dequantize_list(
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    outs: list[Tensor],
    format: str,
    group_size: int,
) -> None:
    """The reference of `torch.ops.lowrank.dequantize_int4_list`: each as `dequantize_flat`.

    Args:
        codes: as there, like the others.
        scales: one tensor for each.
        zeros: the same; none at all in the symmetric formats.
        outs: the same.
        format: of all.
        group_size: of all.
    """
    each: list[Tensor] | list[None] = zeros or [None] * len(outs)
    for one in zip(codes, scales, each, outs, strict=True):
        dequantize_flat(*one, format, group_size)


def empty_int4(
    numel: int, format: str, group_size: int, dtype: torch.dtype, device: torch.device
) -> Packed:
    """Zeroed storage for `numel` entries, which reads as zeros."""
    count = group_count(numel, group_size)
    zeros = torch.zeros(count, dtype=dtype, device=device) if format == "asymmetric" else None
    return Packed(
        torch.zeros(-(-numel // 2), dtype=torch.uint8, device=device),
        torch.zeros(count, dtype=dtype, device=device),
        zeros,
    )


def nf4_values(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of the format "nf4", fp32, ascending from -1 to 1; cached, do not write."""
    return _nf4(torch.empty(0, device=device).device)


@functools.lru_cache(maxsize=32)
def _nf4(device: torch.device) -> Tensor:
    def quantiles(count: int) -> Tensor:
        tail = torch.linspace(_NF4_OFFSET, 0.5, count + 1, dtype=torch.float64)[:-1]
        values: Tensor = torch.special.ndtri(tail)
        return values

    values = torch.cat((-quantiles(7), torch.zeros(1, dtype=torch.float64), quantiles(8)))
    return torch.sort(values / values.max())[0].float().to(device)


def _quantize_symmetric(
    flat: Tensor, format: str, group_size: int, codes: Tensor, scales: Tensor
) -> None:
    values = nf4_values(flat.device)
    middles = (values[1:] + values[:-1]) / 2
    for start, stop, width in spans(flat.numel(), group_size, flat.device):
        rows_gw = flat[start:stop].view(-1, width).float()
        absmax_g = rows_gw.abs().amax(1)
        largest_g = absmax_g if format == "nf4" else absmax_g * MIDRISE_SHARE
        scale_g = ceil_to(largest_g, scales.dtype)
        groups = slice(start // group_size, start // group_size + rows_gw.shape[0])
        scales[groups].copy_(scale_g)
        # With a scale of zero any code reads as zero.
        units_gw = rows_gw * reciprocal(scale_g.float()).unsqueeze(1)
        if format == "nf4":
            chosen = torch.bucketize(units_gw, middles, out_int32=True)
        else:
            chosen = units_gw.add_(_MIDDLE).round_().clamp_(0, 15)
        codes[start:stop].copy_(chosen.view(-1))


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; accepted are {', '.join(map(repr, FORMATS))}")
