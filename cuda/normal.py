"""Tensors of normal numbers that are a function of a seed and a position.

Entry i of a tensor, read row by row, comes from word pair (i mod 4) // 2 of Philox's counter i // 4
under the seed as key (see `philox`), by the transformation of Box and Muller (1958):

    radius^2 = -2 ln u,    entries 2 j and 2 j + 1: radius (cos a, sin a)

with u = (k + 1/2) / 2^31 for 31 of the pair's bits and an angle a from 33. Logarithm, sine and
cosine are polynomials of our own; nothing but additions, multiplications, divisions, square roots
and integer operations is used, each rounded to the nearest fp32 number. So the entries are the same
to the bit on every processor and for every launch, compiled or not, and a shard of rows draws its
own part of the whole (`first`). They lie within 2e-6 of what exact arithmetic makes of the same u,
rounded to fp32, and the same a, and reach 6.66 standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import signed_seed
from .philox import NORMALS, words

# Coefficients from the highest power down; those of core/normal.h, which says what they fit.
_LOG = (0.598530293, 0.799495161, 1.33333635, 4.0)
_COSINE = (-0.0243967157, 0.234937564, -1.33521211, 4.05870914, -4.93480206, 1.0)
_SINE = (0.0772201270, -0.598045170, 2.55003142, -5.16770697, 3.14159250)
_TWO_LN_2 = 1.38629436
_ROOT_HALF = 0x3F3504F3  # pattern of sqrt(1/2)
_ENTRIES = 4  # of one counter
# Counters per chunk, as in `blockwise`; about 150 bytes each.
_CPU_CHUNK = 1 << 14
_DEVICE_CHUNK = 1 << 22


def gaussian(
    shape: tuple[int, ...],
    seed: int | Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    *,
    first: int = 0,
) -> Tensor:
    """A tensor of independent N(0, 1) entries.

    It can be captured in a CUDA graph; replays give new numbers where the seed is a tensor that
    changes between them.

    Args:
        shape: of the tensor.
        seed: 64 bits, see `noise.mix` (lower ones are kept of a longer number), or an int64 tensor
            of one entry, which the host doesn't read.
        dtype: floating. Numbers are drawn in fp32 and cast: fp64 has the same values.
        device: of the result; the seed's by default, or the CPU.
        first: position of the first entry, at least 0. A tensor drawn from `first` on equals the
            entries from there on of a larger one.

    Raises:
        ValueError: `dtype` is not floating, `first` is negative, or the seed is a tensor of another
            type, size or device.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating dtype")
    if first < 0:
        raise ValueError(f"first is {first}; it must be 0 or more")
    given = seed if isinstance(seed, Tensor) else None
    if device is None:
        device = "cpu" if given is None else given.device
    out = torch.empty(shape, dtype=dtype, device=device)
    if given is not None:
        _check_device_seed(given, out.device)
    number = 0 if isinstance(seed, Tensor) else signed_seed(seed)
    torch.ops.lowrank.gaussian(out.view(-1), number, given, first)
    return out


def fill_gaussian(
    outs: Sequence[Tensor], seeds: Sequence[int] | Sequence[Tensor], scale: float = 1.0
) -> None:
    """Fills tensors with N(0, scale^2) entries, each with what `gaussian` gives for its seed.

    One launch for hundreds of tensors on a GPU; it can be captured as `gaussian` can.

    Args:
        outs: contiguous tensors of one floating dtype on one device.
        seeds: of each, all numbers or all int64 tensors of one entry on that device.
        scale: factor on the fp32 numbers (fp64 in fp64), before they are cast.

    Raises:
        ValueError: tensors of several types or devices, other numbers of seeds than of tensors, or
            seeds of both kinds or of another type, size or device.
    """
    if not outs:
        return
    like, given = outs[0], [seed for seed in seeds if isinstance(seed, Tensor)]
    if not like.dtype.is_floating_point or any(
        out.dtype != like.dtype or out.device != like.device or not out.is_contiguous()
        for out in outs
    ):
        raise ValueError(
            "tensors to fill must be contiguous and have one floating dtype and one device; they "
            f"are {sorted({f'{out.dtype} on {out.device}' for out in outs})}"
        )
    if len(seeds) != len(outs) or len(given) not in (0, len(outs)):
        raise ValueError(
            f"{len(outs)} tensors with {len(seeds)} seeds, of which {len(given)} are tensors; "
            "there must be a seed for each, and all or none must be tensors"
        )
    for seed in given:
        _check_device_seed(seed, like.device)
    numbers = [signed_seed(seed) for seed in seeds if not isinstance(seed, Tensor)]
    torch.ops.lowrank.gaussian_list(list(outs), numbers, given, scale)


def _check_device_seed(seed: Tensor, device: torch.device) -> None:
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed is a tensor {tuple(seed.shape)} {seed.dtype} on {seed.device}; it must have "
            f"one entry of torch.int64 on {device}"
        )


def fill_flat(flat: Tensor, seed: int, device_seed: Tensor | None, first: int) -> None:
    """The reference of `torch.ops.lowrank.gaussian`: fills a flat tensor; see `gaussian`.

    Args:
        flat: of any floating dtype.
        seed: the key.
        device_seed: replaces `seed`: int64 of one entry.
        first: position of the first entry.
    """
    key = seed if device_seed is None else device_seed.view(())
    skip = first % _ENTRIES  # entries of the first counter before `first`
    wanted = flat.numel() + skip
    chunk = _ENTRIES * (_CPU_CHUNK if flat.device.type == "cpu" else _DEVICE_CHUNK)
    for start in range(0, wanted, chunk):
        stop = min(start + chunk, wanted)
        count = -(-(stop - start) // _ENTRIES)
        counter = (first + start) // _ENTRIES
        drawn = normals(words(counter, count, NORMALS, key, flat.device))
        begin = max(start, skip)
        flat[begin - skip : stop - skip].copy_(drawn[begin - start : stop - start])


def fill_list(
    outs: list[Tensor], seeds: list[int], device_seeds: list[Tensor], scale: float
) -> None:
    """The reference of `torch.ops.lowrank.gaussian_list`: what `gaussian` draws, times `scale`.

    Args:
        outs: filled; of one floating dtype. Products are rounded to fp32 (fp64 in fp64), then cast.
        seeds: a key each.
        device_seeds: int64 of one entry for each, in place of `seeds`; or none.
        scale: factor on all.
    """
    keys: list[tuple[int, Tensor | None]] = [(0, seed) for seed in device_seeds]
    keys = keys or [(seed, None) for seed in seeds]
    for out, (number, given) in zip(outs, keys, strict=True):
        wide = torch.promote_types(out.dtype, torch.float32)
        drawn = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
        fill_flat(drawn.view(-1), number, given, 0)
        drawn.mul_(scale)
        if drawn is not out:
            out.copy_(drawn)


def normals(words_4k: Tensor) -> Tensor:
    """Turns random bits into normal numbers.

    Args:
        words_4k: int64 (4, k) of 32-bit words, those of a counter in a column.

    Returns:
        fp32 (4 k,), four for each column.
    """
    radius_bits, angle_bits = words_4k[::2], words_4k[1::2]
    squares = _minus_two_log(radius_bits >> 1)
    # Some builds of torch round fp32 roots otherwise. One of fp64 that is off by a unit in the last
    # place still gives the nearest fp32 number, because roots of fp32 are not that near a midpoint.
    radius = squares.double().sqrt_().float()
    turns = (angle_bits - (1 << 31)).to(torch.float32).mul_(2.0**-32)
    z = turns * turns
    signs = (radius_bits & 1).mul_(-2).add_(1)
    cosine = _polynomial(_COSINE, z).mul_(signs).mul_(radius)
    sine = _polynomial(_SINE, z).mul_(turns).mul_(radius)
    return torch.stack((cosine, sine)).permute(2, 1, 0).reshape(-1)


def _minus_two_log(k: Tensor) -> Tensor:
    """-2 ln((k + 1/2) / 2^31) for integers in [0, 2^31), fp32."""
    x = k.to(torch.float32).add_(0.5)
    bits = x.view(torch.int32)
    exponent = (bits - _ROOT_HALF).bitwise_right_shift_(23)
    m = bits.sub_(exponent << 23).view(torch.float32)  # in [sqrt(1/2), sqrt(2))
    s = (m - 1).div_(m.add_(1))
    series = _polynomial(_LOG, s * s).mul_(s)
    whole = exponent.neg_().add_(31).to(torch.float32).mul_(_TWO_LN_2)
    return whole.sub_(series)


def _polynomial(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    """By Horner's rule, each operation rounded by itself."""
    highest, following, *others = coefficients
    value = (z * highest).add_(following)
    for coefficient in others:
        value.mul_(z).add_(coefficient)
    return value
