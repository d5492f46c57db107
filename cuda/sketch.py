"""Test matrices of random signs, in plain torch.

The signs are the bits of Philox (see `philox`): entry i, read row by row, is bit i mod 128 of the
block of counter i // 128 under the seed as key. So they are the same on every device, whatever the
launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import signed_seed
from .philox import SIGNS, words

_BITS = 128
_CHUNK = 1 << 15  # counters per chunk


def rademacher(
    shape: tuple[int, ...],
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A tensor of random signs: Rademacher variables.

    Args:
        shape: of the tensor.
        seed: 64 bits; lower ones are kept of a longer number.
        dtype: floating.
        device: of the result.

    Returns:
        A tensor of -1 and 1.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.lowrank.rademacher(out.view(-1), signed_seed(seed))
    return out


def fill_flat(flat: Tensor, seed: int) -> None:
    """The reference of `torch.ops.lowrank.rademacher`: fills a flat tensor with signs."""
    shifts = torch.arange(32, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK * _BITS):
        chunk = flat[start : start + _CHUNK * _BITS]
        count = -(-chunk.numel() // _BITS)
        words_4k = words(start // _BITS, count, SIGNS, seed, flat.device)
        bits = (words_4k.mT.unsqueeze(2) >> shifts) & 1
        chunk.copy_((1 - 2 * bits).reshape(-1)[: chunk.numel()])
