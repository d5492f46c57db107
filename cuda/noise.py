"""Random numbers that are a function of a seed and a position.

Stochastic rounding needs one number per entry of a matrix. Here it is a hash of the entry's
position, keyed by a 64-bit seed, so it is the same however the matrix is cut into chunks or shards,
and on every device. The hash has two rounds of xor-shift and multiplication (the 32-bit finaliser
of MurmurHash's family); its key enters before each.
"""

from __future__ import annotations

import hashlib
import operator
from typing import overload

import torch
from torch import Tensor

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_MASK24 = (1 << 24) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN24 = 0x9E3779  # an odd number: its multiples modulo 2^24 are all different
_STRIDE = 0x9E3779B1
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B


def mix(seed: int, *parts: int | str) -> int:
    """Combines a seed with integers and names into one 64-bit seed, by hashing.

    The same on all machines and in all processes.

    Args:
        seed: the lowest 64 bits count.
        parts: integers, of which the lowest 64 bits count, and names.

    Raises:
        TypeError: one of them is neither.
    """
    state = 0
    for part in (seed, *parts):
        state = (state + _GOLDEN64 + _number(part)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def _number(part: int | str) -> int:
    """An integer, or a name's first eight bytes of SHA-256 (Python's hash is randomised)."""
    if isinstance(part, str):
        return int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
    try:
        return operator.index(part)
    except TypeError:
        raise TypeError(
            f"a part of a seed is {part!r} ({type(part).__name__}); accepted are int and str"
        ) from None


def random_bits(
    count: int, seed: int, first: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Hashes of the positions first, ..., first + count - 1.

    Args:
        count: of numbers.
        seed: 64 bits, see `mix`.
        first: the first position, at least 0; positions repeat after 2^32.
        device: of the result.

    Returns:
        int32 of shape (count,), all 32 bits random.
    """
    x = torch.arange(count, dtype=torch.int32, device=device)
    x.mul_(_signed(_STRIDE)).add_(_signed(first * _STRIDE + (seed & _MASK32)))
    y = torch.empty_like(x)
    _fold(x, y, 16)
    x.mul_(_FIRST)
    _fold(x, y, 15)
    x.bitwise_xor_(_signed(seed >> 32)).mul_(_signed(_SECOND))
    _fold(x, y, 16)
    return x


def uniform(
    count: int, seed: int, first: int = 0, device: torch.device | str = "cpu", turn: int = 0
) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24; other arguments as in `random_bits`.

    Args:
        count: of numbers.
        seed: 64 bits.
        first: the first position.
        device: of the result.
        turn: adds this multiple of the golden section, modulo 1. The numbers of one position over
            many turns are uniform and far more evenly spread than independent ones.

    Returns:
        fp32 of shape (count,).
    """
    bits = random_bits(count, seed, first, device).bitwise_right_shift_(8)
    if turn:
        bits.add_(turn * _GOLDEN24 & _MASK24)
    return bits.bitwise_and_(_MASK24).to(torch.float32).mul_(2.0**-24)


def stochastic_bfloat16(x: Tensor, seed: int, first: int = 0) -> Tensor:
    """Rounds fp32 to bf16 stochastically, without bias.

    Args:
        x: fp32 of any shape.
        seed: 64 bits, see `mix`.
        first: position of the first entry.

    Returns:
        A bf16 tensor of the shape of `x`; exact numbers, infinities and NaN are unchanged.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    seed = signed_seed(seed)
    torch.ops.lowrank.stochastic_bfloat16(
        x.detach().contiguous().view(-1), out.view(-1), seed, first
    )
    return out


def stochastic_flat(x: Tensor, out: Tensor, seed: int, first: int) -> None:
    """The reference of `torch.ops.lowrank.stochastic_bfloat16`; see `stochastic_bfloat16`."""
    noise = random_bits(x.numel(), seed, first, x.device).bitwise_and_(0xFFFF).view(x.shape)
    raised = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    out.copy_(torch.where(x.isfinite(), raised.view(torch.float32), x))


@overload
def signed_seed(seed: int) -> int: ...


@overload
def signed_seed(seed: None) -> None: ...


def signed_seed(seed: int | None) -> int | None:
    """The int64 with the lowest 64 bits of a seed, as operations take it; None for None."""
    if seed is None:
        return None
    seed &= _MASK64
    return seed - (1 << 64) if seed >> 63 else seed


def _fold(x: Tensor, scratch: Tensor, bits: int) -> None:
    """In place: x ^= x >> bits, with zeros shifted in."""
    torch.bitwise_right_shift(x, bits, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))


def _signed(value: int) -> int:
    """The int32 with the same lowest 32 bits."""
    value &= _MASK32
    return value - (1 << 32) if value >> 31 else value
