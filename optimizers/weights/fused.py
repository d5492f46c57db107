"""Weight updates by a compiled kernel in one pass: decay, update, residual and rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.cuda.arguments import usable
from lowrank.cuda.noise import Seed, split_seed

from ..engine.chunks import wide_dtype
from ..engine.devices import on_gpu
from .int4 import Int4Weight
from .quantized import QuantizedWeight
from .rows import check_capture, weight_chunks


@dataclass(frozen=True)
class FusedChunk:
    """Some rows of a weight.

    Attributes:
        weight: the whole parameter, m x n.
        grad: its gradient, if a multiple of it is subtracted.
        start: first row.
        rows: number of rows.
        seed: of stochastic rounding, a tensor where only the device knows it; or None.
        first: position of the first entry in the whole matrix, for the noise.
        turn: number of the step, for the noise in four bits; a tensor as `seed` may be.
    """

    weight: Tensor
    grad: Tensor | None
    start: int
    rows: int
    seed: Seed | None
    first: int
    turn: Seed = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.weight.shape[1]

    def write(
        self,
        direction: Tensor | None,
        factors: Tensor | None,
        *,
        decay_factor: float | Tensor,
        alpha: float | Tensor,
    ) -> None:
        """W <- decay_factor W - alpha direction - factors o G, rounded.

        Args:
            direction: of the chunk's shape, or None.
            factors: fp32 (1 or rows, 1 or n); None exactly if `grad` is None.
            decay_factor: 1 less the weight decay; a tensor of one entry where only the device
                knows it.
            alpha: step size, as above.
        """
        numbers, sizes = _sizes(decay_factor, alpha, self.weight)
        seed, device_seed = split_seed(self.seed)
        span = slice(self.start, self.start + self.rows)
        grad = None if self.grad is None else self.grad[span]
        if not isinstance(self.weight, QuantizedWeight):
            torch.ops.lowrank.write_back(
                *(self.weight[span], direction, grad, factors),
                *(*numbers, seed, self.first, sizes, device_seed),
            )
            return
        columns = self.weight.shape[1]
        part = self.weight.entries(span.start * columns, span.stop * columns)
        size = self.weight.group_size
        if isinstance(self.weight, Int4Weight):
            turn, device_turn = split_seed(self.turn)
            torch.ops.lowrank.write_back_int4(
                *(*part.parts, direction, grad, factors, *self.shape, size, *numbers),
                *(seed or 0, self.first, turn or 0, sizes, device_turn),
            )
        else:
            codes, scales, zeros = part.parts
            torch.ops.lowrank.write_back_int8(
                *(codes.view(self.shape), scales, zeros, direction, grad, factors),
                *(size, *numbers, seed or 0, self.first, sizes, device_seed),
            )
        # The operation increments the versions of the parts only.
        torch.autograd.graph.increment_version(self.weight)


def _sizes(
    decay_factor: float | Tensor, alpha: float | Tensor, weight: Tensor
) -> tuple[tuple[float, float], Tensor | None]:
    """Decay factor and step size as numbers, or as a tensor if one of them is on the device."""
    given = decay_factor, alpha
    there = [isinstance(number, Tensor) and number.device == weight.device for number in given]
    if not any(there):
        return (float(decay_factor), float(alpha)), None
    sizes = torch.empty(2, dtype=wide_dtype(weight), device=weight.device)
    for place, number, on_device in zip(sizes, given, there, strict=True):
        if on_device:
            assert isinstance(number, Tensor)
            place.copy_(number.view(()))
        else:
            place.fill_(float(number))
    return (1.0, 1.0), sizes


def fused_rows(
    weight: Tensor,
    grad: Tensor | None,
    seed: Seed,
    turn: Seed = 0,
    *,
    stochastic: bool,
    first_row: int = 0,
) -> Iterator[FusedChunk] | None:
    """Chunks of a weight for a fused kernel, or None if there is none.

    Args:
        weight: the parameter, a matrix.
        grad: its gradient, if a multiple of it is subtracted.
        seed: of the rounding, see `rounding_seed`.
        turn: see `rounding_seed`.
        stochastic: round bf16 weights stochastically.
        first_row: position of the first row in the whole matrix.

    Raises:
        ValueError: rounding stochastically while a CUDA graph is captured, by a seed that the host
            knows.
    """
    quantised = isinstance(weight, QuantizedWeight)
    rounds = quantised or (stochastic and weight.dtype == torch.bfloat16)
    # The GEMM itself updates a plain weight without a residual; on a CPU also one with a residual,
    # where the second pass costs less than a product in scratch.
    if not rounds and (grad is None or not on_gpu(weight)):
        return None
    parts = weight.parts() if isinstance(weight, QuantizedWeight) else (weight,)
    if usable(*(part.detach() for part in parts), grad) is None:
        return None
    if rounds:
        what = "stochastic_rounding=True"
        if isinstance(weight, QuantizedWeight):
            what = f"an INT{weight.BITS} weight"
        check_capture(what, seed, turn)
    return _chunks(weight, grad, seed if rounds else None, turn, first_row)


def _chunks(
    weight: Tensor, grad: Tensor | None, seed: Seed | None, turn: Seed, first_row: int
) -> Iterator[FusedChunk]:
    quantised = isinstance(weight, QuantizedWeight)
    for span in weight_chunks(weight):
        yield FusedChunk(
            weight if quantised else weight.detach(),
            *(grad, span.start, span.stop - span.start, seed),
            (first_row + span.start) * weight.shape[1],
            turn,
        )
