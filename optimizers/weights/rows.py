"""Rows of a weight, however stored, as plain tensors that a step may change in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm, prod

import torch
from torch import Tensor

from lowrank.cuda.noise import Seed, stochastic_bfloat16

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.devices import capturing
from ..engine.geometry import RowRange
from ..engine.seeds import draw_seed, draw_seeds
from ..rules.rows import BLOCK
from .int4 import Int4Weight
from .quantized import QuantizedWeight

#: What the seeds here are for.
ROUNDING = "rounding"


def editable_rows(
    weight: Tensor, rows: RowRange, seed: Seed = 0, turn: Seed = 0, *, stochastic: bool = False
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
        ValueError: stochastic rounding while a CUDA graph is captured with numbers that the host
            knows, whose noise would be the same at each step.
    """
    if isinstance(weight, QuantizedWeight):
        check_capture(f"an INT{weight.BITS} weight", seed, turn)
        yield from _quantized_rows(weight, rows, seed, turn)
    elif stochastic and weight.dtype == torch.bfloat16:
        check_capture("stochastic_rounding=True", seed)
        yield from _bfloat16_rows(weight, rows, seed)
    else:
        yield weight, rows


def rounding_seed(weight: Tensor, seed: int, name: str, steps_done: int) -> tuple[int, int]:
    """The seed and the turn of one weight's rounding in one step; see `engine.seeds`.

    In four bits the noise of an entry is one sequence over all steps (`cuda.int4_update`): the seed
    is that of the weight, and the turn the step. Otherwise each step has a seed.
    """
    if isinstance(weight, Int4Weight):
        return draw_seed(seed, name, 0, ROUNDING), steps_done
    return draw_seed(seed, name, steps_done, ROUNDING), 0


def rounding_seeds(
    weights: Sequence[Tensor], seed: int, names: Sequence[str], steps: Sequence[Tensor]
) -> list[tuple[Seed, Seed]]:
    """`rounding_seed` of weights whose step counts only their device knows: the same numbers.

    Args:
        weights: on one device.
        seed: the user's.
        names: those that seed the weights' random numbers.
        steps: 0-d step counts, of the steps before this one.

    Returns:
        For each weight seed and turn, tensors where they depend on the step.
    """
    found: list[tuple[Seed, Seed]] = [(0, 0)] * len(weights)
    four = [i for i, weight in enumerate(weights) if isinstance(weight, Int4Weight)]
    others = [i for i, weight in enumerate(weights) if not isinstance(weight, Int4Weight)]
    if four:
        turns = torch.stack([steps[i] for i in four]).long()
        for i, turn in zip(four, turns.unbind(), strict=True):
            found[i] = draw_seed(seed, names[i], 0, ROUNDING), turn
    if others:
        own = draw_seeds(seed, [names[i] for i in others], [steps[i] for i in others], ROUNDING)
        for i, drawn in zip(others, own.unbind(), strict=True):
            found[i] = drawn, 0
    return found


def rounds(weight: Tensor, *, stochastic: bool) -> bool:
    """Whether a weight is rounded stochastically; other arguments as of `editable_rows`."""
    if isinstance(weight, QuantizedWeight):
        return True
    return stochastic and weight.dtype == torch.bfloat16


def _quantized_rows(
    weight: QuantizedWeight, rows: RowRange, seed: Seed, turn: Seed
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


def _bfloat16_rows(weight: Tensor, rows: RowRange, seed: Seed) -> Iterator[tuple[Tensor, RowRange]]:
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


def check_capture(what: str, *numbers: Seed) -> None:
    """Raises `ValueError` while a CUDA graph is captured, if the host knows all numbers."""
    if capturing() and not any(isinstance(number, Tensor) for number in numbers):
        raise ValueError(
            f"{what} without capturable=True while a CUDA graph is captured: accepted is "
            "capturable=True, or a step outside of a capture; each step needs other noise"
        )
