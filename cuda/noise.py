"""Random numbers that are a function of a seed and a position.

Stochastic rounding needs one number per entry of a matrix. Here it is a hash of the entry's
position, keyed by a 64-bit seed, so it is the same however the matrix is cut into chunks or shards,
and on every device. The hash has two rounds of xor-shift and multiplication (the 32-bit finaliser
of MurmurHash's family); its key enters before each.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_MASK24 = (1 << 24) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN24 = 0x9E3779  # an odd number: its multiples modulo 2^24 are all different
_STRIDE = 0x9E3779B1
_ROUNDS64 = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B


#: A seed, or another number of a step: a 0-d int64 tensor where only the device knows it.
Seed = int | Tensor


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
        for bits, factor in _ROUNDS64:
            state = ((state ^ (state >> bits)) * factor) & _MASK64
        state ^= state >> 31
    return state


def step_seeds(states: Sequence[int], steps: Sequence[Tensor], purpose: int | str) -> Tensor:
    """`mix` with step counts that only a device knows: `mix(..., step, purpose)` of each.

    Args:
        states: what `mix` gives of all parts before the step count.
        steps: a step count for each: 0-d tensors on one device, floating.
        purpose: the last part.

    Returns:
        int64 of shape (count,): the seeds as `signed_seed` gives them.
    """
    seeds = torch.empty(len(steps), dtype=torch.int64, device=steps[0].device)
    signed = [signed_seed(state) for state in states]
    torch.ops.lowrank.step_seeds(list(steps), signed, signed_seed(_number(purpose)), seeds)
    return seeds


def fill_step_seeds(steps: list[Tensor], states: list[int], purpose: int, seeds: Tensor) -> None:
    """The reference of `torch.ops.lowrank.step_seeds`; see `step_seeds`.

    Args:
        steps: as in `step_seeds`.
        states: as signed numbers.
        purpose: the number of the last part, signed.
        seeds: filled.
    """
    # Numbers become tensors by filling them, not by a copy, which a graph would repeat.
    given = [torch.full_like(seeds[:1], state) for state in states]
    state_b = _mixed(torch.cat(given), torch.stack(steps).long())
    seeds.copy_(_mixed(state_b, purpose))


def _mixed(state_b: Tensor, part: Seed) -> Tensor:
    """A round of `mix` on int64 tensors, whose products wrap."""
    state_b = state_b + part + _signed64(_GOLDEN64)
    for bits, factor in _ROUNDS64:
        state_b = (state_b ^ _shifted(state_b, bits)) * _signed64(factor)
    return state_b ^ _shifted(state_b, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of 64 bits, with zeros shifted in."""
    return x.bitwise_right_shift(bits).bitwise_and_((1 << (64 - bits)) - 1)


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
    count: int, seed: Seed, first: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Hashes of the positions first, ..., first + count - 1.

    Args:
        count: of numbers.
        seed: 64 bits, see `mix`; or a 0-d int64 tensor on the device.
        first: the first position, at least 0; positions repeat after 2^32.
        device: of the result.

    Returns:
        int32 of shape (count,), all 32 bits random.
    """
    x = torch.arange(count, dtype=torch.int32, device=device)
    low, high = _halves(seed, first * _STRIDE)
    x.mul_(_signed(_STRIDE)).add_(low)
    y = torch.empty_like(x)
    _fold(x, y, 16)
    x.mul_(_FIRST)
    _fold(x, y, 15)
    x.bitwise_xor_(high).mul_(_signed(_SECOND))
    _fold(x, y, 16)
    return x


def uniform(
    count: int, seed: Seed, first: int = 0, device: torch.device | str = "cpu", turn: Seed = 0
) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24; other arguments as in `random_bits`.

    Args:
        count: of numbers.
        seed: as in `random_bits`.
        first: the first position.
        device: of the result.
        turn: a number, or a 0-d int64 tensor on the device. Adds this multiple of the golden
            section, modulo 1: the numbers of one position over many turns are uniform and far
            more evenly spread than independent ones.

    Returns:
        fp32 of shape (count,).
    """
    bits = random_bits(count, seed, first, device).bitwise_right_shift_(8)
    if isinstance(turn, Tensor) or turn:
        moved = turn * _GOLDEN24 & _MASK24
        bits.add_(moved.int() if isinstance(moved, Tensor) else moved)
    return bits.bitwise_and_(_MASK24).to(torch.float32).mul_(2.0**-24)


def stochastic_bfloat16(x: Tensor, seed: Seed, first: int = 0) -> Tensor:
    """Rounds fp32 to bf16 stochastically, without bias.

    Args:
        x: fp32 of any shape.
        seed: as in `random_bits`.
        first: position of the first entry.

    Returns:
        A bf16 tensor of the shape of `x`; exact numbers, infinities and NaN are unchanged.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    number, given = split_seed(seed)
    torch.ops.lowrank.stochastic_bfloat16(
        x.detach().contiguous().view(-1), out.view(-1), number or 0, first, given
    )
    return out


def stochastic_flat(
    x: Tensor, out: Tensor, seed: int, first: int, device_seed: Tensor | None = None
) -> None:
    """The reference of `torch.ops.lowrank.stochastic_bfloat16`; see `stochastic_bfloat16`.

    Args:
        x: flat.
        out: flat, filled.
        seed: signed.
        first: position of the first entry.
        device_seed: replaces `seed`: int64 of one entry.
    """
    round_stochastically(x, out, seed if device_seed is None else device_seed.view(()), first)


def round_stochastically(x: Tensor, out: Tensor, seed: Seed, first: int) -> None:
    """`stochastic_bfloat16` in plain torch, into a tensor of the same shape."""
    noise = random_bits(x.numel(), seed, first, x.device).bitwise_and_(0xFFFF).view(x.shape)
    raised = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    out.copy_(torch.where(x.isfinite(), raised.view(torch.float32), x))


def split_seed(seed: Seed | None) -> tuple[int | None, Tensor | None]:
    """A seed as operations take it: a signed number, or a tensor."""
    return (None, seed) if isinstance(seed, Tensor) else (signed_seed(seed), None)


@overload
def signed_seed(seed: int) -> int: ...


@overload
def signed_seed(seed: None) -> None: ...


def signed_seed(seed: int | None) -> int | None:
    """The int64 with the lowest 64 bits of a seed, as operations take it; None for None."""
    if seed is None:
        return None
    return _signed64(seed)


def _fold(x: Tensor, scratch: Tensor, bits: int) -> None:
    """In place: x ^= x >> bits, with zeros shifted in."""
    torch.bitwise_right_shift(x, bits, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))


def _halves(seed: Seed, offset: int) -> tuple[Seed, Seed]:
    """The lowest 32 bits of seed + offset, and the next 32 of the seed, as int32."""
    if isinstance(seed, Tensor):
        return (seed + _signed64(offset)).int(), (seed >> 32).int()
    return _signed(offset + (seed & _MASK32)), _signed(seed >> 32)


def _signed64(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _signed(value: int) -> int:
    """The int32 with the same lowest 32 bits."""
    value &= _MASK32
    return value - (1 << 32) if value >> 31 else value
