"""Block-wise 8-bit quantisation of optimizer moments; the reference is plain torch.

A tensor is read as one flat row and cut into blocks (the last one may be shorter). Each block
stores its largest magnitude as fp32, `absmax`, and every element stores the index of the entry of
a 256-value map nearest to `element / absmax`. The map is the dynamic one of Dettmers et al.
(2022, "8-bit Optimizers via Block-wise Quantization"): seven decades, each cut linearly and the
largest most finely, so that small moments keep a relative precision of a few percent.

The unsigned map's 0 is never chosen. A second moment that is rounded to 0 beside a first moment
that isn't would make the next step without a gradient m / eps: thousands of learning rates.

The nearest entry is found exactly with one table look-up instead of a binary search. The upper
16 bits of an fp32 pattern select a table entry; no two midpoints of the map share those bits, so
the lower 16 bits decide at most one comparison. Adding the lower bits to an entry that holds
`(code << 16) + 0xFFFF - threshold` makes that comparison: the carry is its result.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .groups import reciprocal

DEFAULT_BLOCK = 256
_DECADES = 7
_FIRST_ENTRY, _LAST_ENTRY = 0x32FF, 0x3F80
# Elements per chunk, which bounds the scratch (12 bytes each): few enough for a CPU's caches, and
# enough to hide the cost of dispatching ten operations.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22


def blockwise_bytes(numel: int, block: int = DEFAULT_BLOCK) -> int:
    """Returns the bytes that `numel` quantised elements take: codes and fp32 absmax.

    Args:
        numel: Number of elements, at least 0.
        block: Elements that share one absmax.

    Returns:
        `numel + 4 * ceil(numel / block)` bytes.

    Raises:
        ValueError: If `numel` is negative or `block` is not positive.
    """
    if numel < 0:
        raise ValueError(f"numel is {numel}; it must be 0 or more")
    return numel + 4 * _block_count(numel, block)


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """Returns the 256 values of the codes 0 to 255, in ascending order.

    Args:
        signed: Whether the map covers [-1, 1] (first moments) or [0, 1] (second moments).
        device: Of the result.

    Returns:
        fp32 tensor of shape (256,). It is cached and shared: do not write to it.
    """
    return _cached_map(signed, _resolve(device))


def quantize_blockwise(
    x: Tensor,
    signed: bool,
    block: int = DEFAULT_BLOCK,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantises a tensor to 8 bits per element.

    Every element becomes the code nearest to `x * (1 / absmax)` (computed in fp32); a tie goes to
    the code of smaller magnitude. With `signed=False` it is the nearest of those above 0, so that
    what is small, or 0 beside other numbers, comes back as 3.25e-7 `absmax`; negative elements
    become 0. Blocks of zeros, and of numbers below 2^-126, come back as exact zeros. A NaN or an
    infinity makes `absmax` and, when dequantised, every element of its block non-finite: callers
    that want to survive such values skip them before.

    Args:
        x: Tensor of any shape and floating dtype, contiguous or not (a non-contiguous one is
            copied). fp64 is rounded to fp32 first.
        signed: Which `dynamic_map` to use.
        block: Elements of the flattened tensor that share one absmax.
        out: Contiguous tensors `(codes, absmax)` to write to instead of making new ones.

    Returns:
        `codes`, uint8 of the shape of `x`, and `absmax`, fp32 of shape (ceil(numel / block),).

    Raises:
        ValueError: If `x` is not floating, `block` is not positive, or `out` does not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be a floating dtype")
    count = _block_count(x.numel(), block)
    if out is None:
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        absmax = torch.empty(count, dtype=torch.float32, device=x.device)
    else:
        codes, absmax = out
        _check_buffer("out codes", codes, x.shape, torch.uint8, x.device)
        _check_buffer("out absmax", absmax, torch.Size((count,)), torch.float32, x.device)
    flat = x.detach().reshape(-1)
    torch.ops.lowrank.quantize_blockwise(flat, codes.view(-1), absmax, signed, block)
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    signed: bool,
    block: int = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Turns codes back into numbers: `dynamic_map[code] * absmax` of the element's block.

    Args:
        codes: uint8 tensor of any shape.
        absmax: fp32 tensor of shape (ceil(numel / block),).
        signed: Which `dynamic_map` the codes index.
        block: Elements of the flattened tensor that share one absmax.
        dtype: Floating dtype of the result; ignored when `out` is given.
        out: Contiguous floating tensor of the shape of `codes` to write to.

    Returns:
        Tensor of the shape of `codes`; `out` if it was given.

    Raises:
        ValueError: If dtypes, shapes or devices do not fit together.
    """
    count = _block_count(codes.numel(), block)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes has dtype {codes.dtype}; it must be torch.uint8")
    _check_buffer("absmax", absmax, torch.Size((count,)), torch.float32, codes.device)
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not out.is_floating_point():
        raise ValueError(f"the result has dtype {out.dtype}; it must be a floating dtype")
    _check_buffer("out", out, codes.shape, out.dtype, codes.device)
    torch.ops.lowrank.dequantize_blockwise(codes.reshape(-1), absmax, out.view(-1), signed, block)
    return out


def quantize_flat(
    flat_n: Tensor, codes_n: Tensor, absmax_b: Tensor, signed: bool, block: int
) -> None:
    """The reference of `torch.ops.lowrank.quantize_blockwise`; see `quantize_blockwise`."""
    table = _lookup_table(signed, flat_n.device)
    longest = min(flat_n.numel(), _chunk_elements(flat_n.device, block))
    scratch = torch.empty(3, longest, dtype=torch.int32, device=flat_n.device)
    for start, stop, width in _chunks(flat_n.numel(), block, flat_n.device):
        length = stop - start
        index, value = scratch[0, :length], scratch[1, :length]
        bits = scratch[2, :length]
        ratio_bw = bits.view(torch.float32).view(-1, width)
        rows_bw = flat_n[start:stop].view(-1, width).to(torch.float32)
        first = start // block
        scale_b = absmax_b[first : first + rows_bw.shape[0]]
        # Many times faster than vector_norm(inf); NaN propagates in both.
        torch.amax(torch.abs(rows_bw, out=ratio_bw), dim=1, out=scale_b)
        torch.mul(rows_bw, reciprocal(scale_b).unsqueeze(1), out=ratio_bw)
        torch.bitwise_right_shift(bits, 16, out=index)
        index.bitwise_and_(0xFFFF)
        torch.index_select(table, 0, index, out=value)
        value.add_(bits)
        if signed:
            # Negative entries hold the complement of the code, so that there, too, a larger
            # magnitude (a larger bit pattern) carries upward.
            value.bitwise_xor_(bits.bitwise_right_shift_(31))
        # Only the lowest byte of the shifted value is the code; the copy drops the rest.
        codes_n[start:stop].copy_(value.bitwise_right_shift_(16))


def dequantize_flat(
    codes_n: Tensor, absmax_b: Tensor, out_n: Tensor, signed: bool, block: int
) -> None:
    """The reference of `torch.ops.lowrank.dequantize_blockwise`; see `dequantize_blockwise`."""
    values = _cached_map(signed, codes_n.device)
    longest = min(codes_n.numel(), _chunk_elements(codes_n.device, block))
    index_c = torch.empty(longest, dtype=torch.int32, device=codes_n.device)
    value_c = torch.empty(longest, dtype=torch.float32, device=codes_n.device)
    for start, stop, width in _chunks(codes_n.numel(), block, codes_n.device):
        index, value = index_c[: stop - start], value_c[: stop - start]
        index.copy_(codes_n[start:stop])
        torch.index_select(values, 0, index, out=value)
        first = start // block
        rows_bw = value.view(-1, width)
        scale_b = absmax_b[first : first + rows_bw.shape[0]]
        torch.mul(rows_bw, scale_b.unsqueeze(1), out=out_n[start:stop].view(-1, width))


def _chunks(numel: int, block: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Yields (start, stop, elements per block) of chunks of equal blocks; the short one last."""
    step = _chunk_elements(device, block)
    whole = numel - numel % block
    for start in range(0, whole, step):
        yield start, min(start + step, whole), block
    if whole < numel:
        yield whole, numel, numel - whole


def _chunk_elements(device: torch.device, block: int) -> int:
    wanted = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    return max(1, wanted // block) * block


@functools.lru_cache(maxsize=32)
def _cached_map(signed: bool, device: torch.device) -> Tensor:
    values = [0.0, 1.0]
    for exponent in range(_DECADES):
        # The signed map spends one bit on the sign, so its decades have half the entries.
        parts = 2 ** (exponent if signed else exponent + 1)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2
        decade = 10.0 ** (exponent - _DECADES + 1) * fractions
        values += decade.tolist()
        if signed:
            values += (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


@functools.lru_cache(maxsize=32)
def rank_table(signed: bool, device: torch.device) -> Tensor:
    """The kernels' look-up table of magnitudes, see core/blockwise.h: int32 (3202,), cached.

    Entry i belongs to the fp32 magnitudes up to 1 whose upper 16 bits are 0x32FF + i; the first one
    to smaller ones too.
    """
    positive = _cached_map(signed, torch.device("cpu"))
    threshold = _midpoint_bits(positive[positive >= 0])
    upper = torch.arange(_FIRST_ENTRY, _LAST_ENTRY + 1, dtype=torch.int64)
    rank_low, rank_high = _ranks(threshold, upper, signed)
    inside = threshold[rank_low.clamp(max=threshold.numel() - 1)] & 0xFFFF
    carry = torch.where(rank_high > rank_low, 0xFFFF - inside, 0)
    return ((rank_low << 16) + carry).to(device=device, dtype=torch.int32)


@functools.lru_cache(maxsize=32)
def both_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The signed and the unsigned `rank_table`, and both maps, each in one cached tensor."""
    return (
        torch.cat([rank_table(signed, device) for signed in (True, False)]),
        torch.cat([_cached_map(signed, device) for signed in (True, False)]),
    )


@functools.lru_cache(maxsize=32)
def _lookup_table(signed: bool, device: torch.device) -> Tensor:
    """Returns int32 (65536,): addends to fp32 patterns that give the code in bits 16 to 23."""
    positive = _cached_map(signed, torch.device("cpu"))
    positive = positive[positive >= 0]
    zero_code = 256 - positive.numel()
    threshold = _midpoint_bits(positive)
    upper = torch.arange(0x8000, dtype=torch.int64)  # patterns of magnitudes, without the sign
    rank_low, rank_high = _ranks(threshold, upper, signed)
    inside = threshold[rank_low.clamp(max=threshold.numel() - 1)] & 0xFFFF
    carry = torch.where(rank_high > rank_low, 0xFFFF - inside, 0)
    nonnegative = (((zero_code + rank_low - upper) & 0xFF) << 16) + carry
    if signed:
        # The most negative value has no partner for +1, hence the last rank falls to the one
        # before; the complement of 255 - code is the code.
        last = positive.numel() - 2
        complement = 255 - zero_code + rank_low.clamp(max=last)
        carry = torch.where(rank_low < last, carry, 0)
        negative = (((complement - upper) & 0xFF) << 16) + carry
    else:
        negative = (-upper & 0xFF) << 16
    return torch.cat((nonnegative, negative)).to(device=device, dtype=torch.int32)


def _ranks(threshold: Tensor, upper: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Of the smallest and largest magnitude with these upper bits: how many thresholds are below.

    At least one in the unsigned map, whose code 0 is never chosen.
    """
    lowest, highest = upper << 16, (upper << 16) | 0xFFFF
    least = 0 if signed else 1
    low, high = torch.searchsorted(threshold, lowest), torch.searchsorted(threshold, highest)
    return low.clamp(min=least), high.clamp(min=least)


def _midpoint_bits(values: Tensor) -> Tensor:
    """Returns the patterns (int64) of the largest fp32 numbers not above each midpoint."""
    exact = (values[:-1].double() + values[1:].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.zeros_like(rounded))
    floor = torch.where(rounded.double() > exact, below, rounded)
    return floor.view(torch.int32).long()


def _resolve(device: torch.device | str) -> torch.device:
    """Returns the device with its index, so that `cuda` and `cuda:0` share one cache entry."""
    return torch.empty(0, device=device).device


def _block_count(numel: int, block: int) -> int:
    if block < 1:
        raise ValueError(f"block is {block}; it must be 1 or more")
    return -(-numel // block)


def _check_buffer(
    name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; "
            f"it must be {tuple(shape)} {dtype} on {device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
