"""Moments in four or eight bits, in blocks that lie within a row.

Each row is cut into blocks of `WIDTH` neighbours (the last one of a row may be shorter). A block
has a scale s = max|x| / L in fp32, with L = 7 or 127, and integer codes round(x / s) from -L to L
in two's complement: a zero is stored as zero. So that rows can be worked on, and lie on other
processes, one by one, no block and no byte belongs to two of them: a row of n entries takes
ceil(n bits / 8) bytes and 4 ceil(n / WIDTH) bytes of scales.

Four bits are rounded stochastically: with round-to-nearest an entry below half a step of the
average never changes, and momentum once stored would not decay (0.9 x 1 is rounded to 1). The noise
is a function of the step and an entry's position in the whole matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .groups import reciprocal
from .int4 import pack, unpack
from .noise import mix, uniform

#: Entries that share a scale.
WIDTH = 128
#: Accepted numbers of bits, and the largest code of each.
LARGEST = {4: 7, 8: 127}
#: Seed of the noise.
NOISE = 20261128


def code_bytes(columns: int, bits: int) -> int:
    """Bytes of a row's codes."""
    return -(-columns * bits // 8)


def blocks(columns: int) -> int:
    """Scales of a row."""
    return -(-columns // WIDTH)


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row, codes and scales."""
    return code_bytes(columns, bits) + 4 * blocks(columns)


def empty(rows: int, columns: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales (fp32) of zeros."""
    codes = torch.zeros(rows, code_bytes(columns, bits), dtype=torch.uint8, device=device)
    return codes, torch.zeros(rows, blocks(columns), device=device)


def seed_of(step: int) -> int:
    """The seed of a step's noise."""
    return mix(NOISE, step)


def noise_of(
    rows: int, columns: int, seed: int, first: int, stride: int, device: torch.device
) -> Tensor:
    """Numbers of [0, 1) for some entries of a matrix, the same however it is cut.

    Args:
        rows: here.
        columns: here.
        seed: see `seed_of`.
        first: the position of the first entry in the whole matrix.
        stride: from one row to the next: the columns of the whole matrix.
        device: of the result.

    Returns:
        fp32 of shape (rows, columns).
    """
    return uniform(rows * stride, seed, first, device).view(rows, stride)[:, :columns]


def quantize(rows_kn: Tensor, bits: int, noise_kn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows.

    Args:
        rows_kn: any floating dtype.
        bits: 4 or 8.
        noise_kn: numbers of [0, 1) for stochastic rounding; None rounds to the nearest code.
    """
    largest = LARGEST[bits]
    count, columns = rows_kn.shape
    padded = functional.pad(rows_kn.float(), (0, -columns % WIDTH)).view(count, -1, WIDTH)
    # Times the reciprocal, as core/cautious.h says.
    scales_kb = padded.abs().amax(-1).mul_(1 / largest)
    units = (padded * reciprocal(scales_kb).unsqueeze(-1)).view(count, -1)[:, :columns]
    units = units.round() if noise_kn is None else units.add(noise_kn).floor_()
    units = torch.where(units.isnan(), 0.0, units.clamp_(-largest, largest))
    codes = units.to(torch.int8).view(torch.uint8)
    return codes if bits == 8 else _packed(codes), scales_kb


def dequantize(codes_kw: Tensor, scales_kb: Tensor, columns: int, bits: int) -> Tensor:
    """Rows of `columns` entries in fp32, a new tensor."""
    codes = codes_kw if bits == 8 else _unpacked(codes_kw, columns)
    units = functional.pad(codes.view(torch.int8).float(), (0, -columns % WIDTH))
    units = units.view(len(codes), -1, WIDTH).mul_(scales_kb.unsqueeze(-1))
    return units.view(len(codes), -1)[:, :columns].contiguous()


def _packed(codes_kn: Tensor) -> Tensor:
    """Two codes a byte, none of two rows."""
    halves = functional.pad(codes_kn.bitwise_and(15), (0, codes_kn.shape[1] % 2))
    return pack(halves.flatten()).view(len(codes_kn), -1)


def _unpacked(packed_kw: Tensor, columns: int) -> Tensor:
    """Codes of eight bits, as their sign says."""
    halves = unpack(packed_kw.flatten(), 2 * packed_kw.numel())
    codes = halves.view(len(packed_kw), -1)[:, :columns]
    return codes.bitwise_xor(8).sub_(8)
