"""Weights in four bits, and writing small updates into them, in plain torch.

A group of entries is stored as x = s (q - 7.5) for 4-bit codes q and one scale s ("midrise" of
`int4`, from which dequantisation and packing come). A step of an optimizer is far smaller than s:

    y = x / s + 7.5,   q = floor(y + u)  in 0..15,   u in [0, 1)

is unbiased, but an entry that should move by d in steps of any length arrives with a variance of
about s d if each u is drawn anew, which is more than the weights' own. Two things keep it small.

- The scale stays until an entry leaves the range of the codes, or until none uses the outer
  third of it. Then it is chosen anew, with some headroom. A new scale at each step would move all
  entries of the group by about 0.4 s, those too that have no update.
- The numbers u of an entry are a golden-section sequence (`noise.uniform` with `turn`): a uniform
  start, and 0.618... more at each step, modulo 1. As long as the updates of an entry vary slowly,
  as those of Adam do, its rounding errors cancel instead of adding up: of k updates of u s each
  about k u arrive, up to one, where independent numbers give k u up to sqrt(k u).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import ceil_to, spans
from .int4 import pack, quantize_int4, unpack
from .noise import Seed, uniform

FORMAT = "midrise"
GROUP_SIZE = 64
_MIDDLE = 7.5
#: The largest distance of neighbouring values, in scales.
LARGEST_STEP = 1.0
#: The smallest scale per largest entry. A product: torch divides by a number as the reciprocal on
#: GPUs, and by a quotient on CPUs.
NEEDED = 1 / _MIDDLE
#: A new scale has its largest entry at 7.5 / HEADROOM steps from the middle.
HEADROOM = 1.1
#: A scale is chosen anew if it is more than this many times what the largest entry needs.
TOO_WIDE = 1.5


def encode(
    dense: Tensor, group_size: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds a tensor to the nearest codes.

    Args:
        dense: any shape and floating dtype.
        group_size: entries that share a scale, an even number.
        dtype: of the scales, that of `dense` by default.

    Returns:
        `codes`, uint8 (ceil(numel / 2),), and `scales`, one a group.

    Raises:
        ValueError: `dense` is not floating.
    """
    codes, scales, _ = quantize_int4(dense, FORMAT, group_size, dtype=dtype)
    return codes, scales


def store_changed(
    new: Tensor,
    old: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    seed: Seed | None,
    first: int,
    turn: Seed,
) -> None:
    """Rounds the groups in which `new` differs from `old`; the others are unchanged to the bit.

    Args:
        new: flat entries.
        old: the dequantised entries.
        codes: packed, changed in place like scales.
        scales: one a group.
        group_size: entries that share a scale, an even number.
        seed: rounds stochastically, in the present scale where it fits; to the nearest codes of a
            new scale when None.
        first: position of the first entry, for the noise.
        turn: number of the step, for the noise; a tensor where only a device knows it.
    """
    for start, stop, width in spans(new.numel(), group_size, new.device):
        rows_gw = new[start:stop].view(-1, width)
        changed_g1 = (rows_gw != old[start:stop].view(-1, width)).any(1, keepdim=True)
        groups = slice(start // group_size, start // group_size + len(rows_gw))
        bytes_ = codes[start // 2 : -(-stop // 2)]
        before_gw = unpack(bytes_, stop - start).view(-1, width)
        rows_gw = rows_gw.to(torch.float32)
        if seed is None:
            fresh, scale_g = encode(rows_gw, group_size, scales.dtype)
            after_gw = unpack(fresh, stop - start).view(-1, width)
        else:
            scale_g = fitting_scales(rows_gw, scales[groups])
            noise = uniform(stop - start, seed, first + start, new.device, turn)
            divisor_g1 = torch.where(scale_g == 0, 1.0, scale_g.float()).unsqueeze(1)
            units_gw = (rows_gw / divisor_g1).add_(_MIDDLE).add_(noise.view(rows_gw.shape))
            after_gw = units_gw.floor_().clamp_(0, 15).to(torch.uint8)
        pack(torch.where(changed_g1, after_gw, before_gw).view(-1), out=bytes_)
        scales[groups] = torch.where(changed_g1.view(-1), scale_g, scales[groups])


def fitting_scales(rows_gw: Tensor, scale_g: Tensor) -> Tensor:
    """The present scales, or new ones where they are too narrow or too wide.

    Args:
        rows_gw: fp32 entries of each group.
        scale_g: their scales.
    """
    needed_g = rows_gw.abs().amax(1) * NEEDED
    present_g = scale_g.float()
    # A comparison with NaN is false: groups that aren't finite get such a scale, which is seen.
    fits_g = (needed_g <= present_g) & (present_g <= needed_g * TOO_WIDE)
    return torch.where(fits_g, scale_g, ceil_to(needed_g * HEADROOM, scale_g.dtype))
