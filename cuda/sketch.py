"""Test matrices of random signs, in plain torch.

The signs are the bits of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011): entry i, read row by row, is bit i mod 128 of the block of counter i // 128 under the
seed as key. So they are the same on every device, whatever the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import signed_seed

_MASK32 = (1 << 32) - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_BITS = 128
_CHUNK = 1 << 15  # counters worked on at once


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
        device: where they are made.

    Returns:
        A tensor of -1 and 1.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.lowrank.rademacher(out.view(-1), signed_seed(seed))
    return out


def philox(counters: Tensor, key: int) -> Tensor:
    """Philox4x32-10.

    Args:
        counters: int64 (k, 4), each entry a 32-bit word, lowest first.
        key: 64 bits.

    Returns:
        int64 (k, 4) of 32-bit words.
    """
    c0, c1, c2, c3 = counters.unbind(1)
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), 1)


def fill_flat(flat: Tensor, seed: int) -> None:
    """The reference of `torch.ops.lowrank.rademacher`: fills a flat tensor with signs."""
    shifts = torch.arange(32, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK * _BITS):
        chunk = flat[start : start + _CHUNK * _BITS]
        index = torch.arange(-(-chunk.numel() // _BITS), device=flat.device) + start // _BITS
        zeros = torch.zeros_like(index)
        words = philox(torch.stack((index & _MASK32, index >> 32, zeros, zeros), 1), seed)
        bits = (words.unsqueeze(2) >> shifts) & 1
        chunk.copy_((1 - 2 * bits).view(-1)[: chunk.numel()])


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a 32 x 32 bit product; int64 can't hold it, so by halves."""
    low = (x & 0xFFFF) * factor  # below 2^48
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
