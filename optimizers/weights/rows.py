"""Rows of a weight, however stored, as plain tensors that a step may change in place."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm, prod

import torch
from torch import Tensor

from lowrank.cuda.noise import stochastic_bfloat16

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.devices import capturing
from ..engine.geometry import RowRange
from ..engine.seeds import draw_seed
from ..rules.rows import BLOCK
from .int4 import Int4Weight
from .quantized import QuantizedWeight


def editable_rows(
    weight: Tensor, rows: RowRange, seed: int = 0, turn: int = 0, *, stochastic: bool = False
) -> Iterator[tuple[Tensor, RowRange]]:
    """Yields chunks of a weight's rows; in-place changes of a chunk are written to the weight.

    A plain weight is a single chunk. A quantised weight is dequantised in chunks of whole groups,
    of the size of `row_chunks`, in fp32 (fp64 for fp64); changed groups are rounded stochastically,
    in eight bits with a new range. With `stochastic` bf16 weights are chunked and rounded in the
    same way.

    Args:
        weight: the parameter.
        rows: the range of its rows in the whole matrix.
        seed: of the rounding, see `rounding_seed`. The noise of an entry depends only on the seed,
            the turn and its position.
        turn: see `rounding_seed`.
        stochastic: round bf16 weights stochastically.

    Yields:
        A plain tensor of some rows, and their range in the whole matrix.

    Raises:
        ValueError: stochastic rounding while a CUDA graph is captured, which would repeat the
            same noise at each step.
    """
    if isinstance(weight, QuantizedWeight):
        check_capture(f"an INT{weight.BITS} weight")
        yield from _quantized_rows(weight, rows, seed, turn)
    elif stochastic and weight.dtype == torch.bfloat16:
        check_capture("stochastic_rounding=True")
        yield from _bfloat16_rows(weight, rows, seed)
    else:
        yield weight, rows


def rounding_seed(weight: Tensor, seed: int, name: str, steps_done: int) -> tuple[int, int]:
    """The seed and the turn of one weight's rounding in one step; see `engine.seeds`.

    In four bits the noise of an entry is one sequence over all steps (`cuda.int4_update`): the seed
    is that of the weight, and the turn the step. Otherwise each step has a seed.
    """
    if isinstance(weight, Int4Weight):
        return draw_seed(seed, name, 0, "rounding"), steps_done
    return draw_seed(seed, name, steps_done, "rounding"), 0


def _quantized_rows(
    weight: QuantizedWeight, rows: RowRange, seed: int, turn: int
) -> Iterator[tuple[Tensor, RowRange]]:
    width = weight.shape[1]
    dtype = wide_dtype(weight)
    for span in weight_chunks(weight):
        chunk = weight.entries(span.start * width, span.stop * width)
        old = chunk.load(dtype)
        new = old.clone()
        yield new.view(span.stop - span.start, width), rows.part(span)
        chunk.store(new, old, seed, (rows.start + span.start) * width, turn)
        torch.autograd.graph.increment_version(weight)


def _bfloat16_rows(weight: Tensor, rows: RowRange, seed: int) -> Iterator[tuple[Tensor, RowRange]]:
    if weight.dim() == 0:
        wide = weight.float()
        yield wide, rows
        weight.copy_(stochastic_bfloat16(wide, seed))
        return
    width = prod(weight.shape[1:])
    for span in weight_chunks(weight):
        chunk = weight[span]
        # A row-major copy, whatever the strides of the weight.
        wide = chunk.to(torch.float32, memory_format=torch.contiguous_format)
        yield wide, rows.part(span)
        chunk.copy_(stochastic_bfloat16(wide, seed, (rows.start + span.start) * width))


def weight_chunks(weight: Tensor) -> Iterator[slice]:
    """`row_chunks` that end at ends of blocks of 8-bit moments and of groups of the weight."""
    block = lcm(BLOCK, weight.group_size) if isinstance(weight, QuantizedWeight) else BLOCK
    return row_chunks(weight, block=block)


def check_capture(what: str) -> None:
    """Raises `ValueError` while a CUDA graph is captured."""
    if capturing():
        raise ValueError(
            f"{what} while a CUDA graph is captured: accepted is a step outside of one, or dense "
            "weights (weight_bits=None, stochastic_rounding=False)"
        )
