"""Philox4x32-10 in plain torch: random bits that are a function of a key and a counter.

The generator of Salmon et al. ("Parallel random numbers: as easy as 1, 2, 3", 2011): 128 bits from
a 64-bit key and a 128-bit counter. The counter's lower half is the position in a tensor;
its upper half distinguishes purposes under one seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = (1 << 32) - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

#: Upper halves of counters; those of core/noise.h.
SIGNS, NORMALS = 0, 1


def philox(counters: Tensor, key: int | Tensor) -> Tensor:
    """The bits of each counter.

    Args:
        counters: int64 (4, k), each entry a 32-bit word, lowest first.
        key: 64 bits, or a 0-d int64 tensor on the same device.

    Returns:
        int64 (4, k) of 32-bit words.
    """
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1, c2, c3 = counters.clone().unbind()
    first, second = torch.empty_like(counters[:2]).unbind()
    for _ in range(_ROUNDS):
        # Products of 32-bit words wrap as int64, which leaves all 64 bits right.
        torch.mul(c0, _MULTIPLIERS[0], out=first)
        torch.mul(c2, _MULTIPLIERS[1], out=second)
        torch.bitwise_right_shift(second, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK32)
        torch.bitwise_right_shift(first, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK32)
        # The lower halves, whose upper bits the masks above drop, in place.
        c1, second = second, c1
        c3, first = first, c3
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3)).bitwise_and_(_MASK32)


def words(first: int, count: int, purpose: int, key: int | Tensor, device: torch.device) -> Tensor:
    """The bits of the counters first, ..., first + count - 1 of one purpose.

    Args:
        first: at least 0.
        count: of counters.
        purpose: `SIGNS` or `NORMALS`.
        key: as in `philox`.
        device: of the result.

    Returns:
        int64 (4, count) of 32-bit words.
    """
    index = torch.arange(first, first + count, device=device)
    upper = torch.full_like(index, purpose)
    counters = (index & _MASK32, (index >> 32) & _MASK32, upper, torch.zeros_like(index))
    return philox(torch.stack(counters), key)
