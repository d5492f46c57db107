"""The weight seam: rows of a weight as plain tensors that a step may change in place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank.cuda.groups import chunk_elements
from lowrank.cuda.noise import mix, stochastic_bfloat16

from ..engine.geometry import RowRange
from ..rules.rows import BLOCK
from .int8 import Int8Weight


def editable_rows(
    weight: Tensor, rows: RowRange, seed: int = 0, *, stochastic: bool = False
) -> Iterator[tuple[Tensor, RowRange]]:
    """Yields chunks of a weight's rows; what is done to them in place is in the weight afterwards.

    A plain weight is its own only chunk. An INT8 weight is dequantised in chunks of whole groups
    and about 2^18 entries (2^22 beyond CPUs), in fp32 (fp64 for fp64); each group that was
    changed gets a new range and is rounded stochastically. With `stochastic` a bf16 weight is
    treated likewise.

    Args:
        weight: the parameter.
        rows: which rows of the whole matrix it holds.
        seed: of the rounding; another one for each weight and step. The noise of an entry depends
            on the seed and its position alone.
        stochastic: round bf16 weights stochastically.

    Yields:
        A plain tensor of some rows, and which rows of the whole matrix these are.

    Raises:
        ValueError: rounding stochastically while a CUDA graph is captured, which would repeat the
            same noise at each step.
    """
    if isinstance(weight, Int8Weight):
        check_capture("an INT8 weight")
        yield from _int8_rows(weight, rows, seed)
    elif stochastic and weight.dtype == torch.bfloat16:
        check_capture("stochastic_rounding=True")
        yield from _bfloat16_rows(weight, rows, seed)
    else:
        yield weight, rows


def rounding_seed(seed: int, step: int, index: int) -> int:
    """The seed of one weight's rounding in one step."""
    return mix(seed, step, index)


def _int8_rows(weight: Int8Weight, rows: RowRange, seed: int) -> Iterator[tuple[Tensor, RowRange]]:
    width = weight.shape[1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    step = aligned_rows(weight)
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        chunk = weight.entries(start * width, stop * width)
        old = chunk.load(dtype)
        new = old.clone()
        yield new.view(stop - start, width), _part(rows, start, stop)
        chunk.store(new, old, seed, (rows.start + start) * width)
        torch.autograd.graph.increment_version(weight)


def _bfloat16_rows(weight: Tensor, rows: RowRange, seed: int) -> Iterator[tuple[Tensor, RowRange]]:
    if weight.dim() == 0:
        wide = weight.float()
        yield wide, rows
        weight.copy_(stochastic_bfloat16(wide, seed))
        return
    width = math.prod(weight.shape[1:])
    step = block_rows(weight.device, width)
    for start in range(0, weight.shape[0], step):
        chunk = weight[start : start + step]
        # A copy in rows, whatever the strides of the weight.
        wide = chunk.to(torch.float32, memory_format=torch.contiguous_format)
        yield wide, _part(rows, start, start + len(chunk))
        chunk.copy_(stochastic_bfloat16(wide, seed, (rows.start + start) * width))


def _part(rows: RowRange, start: int, stop: int) -> RowRange:
    return RowRange(rows.start + start, rows.start + stop, rows.reduce)


def aligned_rows(weight: Int8Weight) -> int:
    """How many rows to work on at once: a bounded number, after which a group ends, too."""
    width = weight.shape[1]
    aligned = weight.group_size // math.gcd(weight.group_size, width)
    return chunk_elements(weight.device, aligned * width) // width


def block_rows(device: torch.device, columns: int) -> int:
    """How many rows to work on at once, such that chunks begin with a block of 8-bit moments."""
    columns = max(1, columns)
    aligned = BLOCK // math.gcd(BLOCK, columns) * columns
    return chunk_elements(device, aligned) // columns


def check_capture(what: str) -> None:
    """Raises `ValueError` while a CUDA graph is captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{what} while a CUDA graph is captured: accepted is a step outside of one, or dense "
            "weights (weight_bits=None, stochastic_rounding=False)"
        )
