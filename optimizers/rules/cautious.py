"""Adam with a factored second moment, a quantised momentum and cautious updates.

For a gradient G of m x n entries at step t, with the second moment of Adafactor (Shazeer and Stern,
2018, arXiv 1804.04235):

    R <- b2 R + (1 - b2) mean_columns(G o G),    C <- b2 C + (1 - b2) mean_rows(G o G)
    V_ij = R_i C_j / mean(R) / (1 - b2^t)
    M <- b1 M + (1 - b1) G
    D = M / (1 - b1^t) / (sqrt(V) + eps)
    K_ij = 1 where D_ij G_ij > 0, else 0   (Liang et al., "Cautious Optimizers", arXiv 2411.16085)
    W <- (1 - lr wd) W - lr D o K / max(mean of K in the row, 1e-3)

and D itself unless cautious. So an entry whose momentum disagrees with its gradient rests, and the
others of its row make up for it; the cited paper takes the mean of K over the tensor, the row's
needs no second pass over it and no communication where rows are spread. M is stored in four or
eight bits after its use (`cuda.row_quantized`), or as it is. Memory: the factors, 4 (m + n) bytes,
and of M m (ceil(n bits / 8) + 4 ceil(n / 128)) bytes. No m x n temporary is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowrank.cuda import row_quantized
from lowrank.cuda.cautious import advance, agreeing, cautious_factors, directed
from lowrank.cuda.noise import signed_seed

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.sharding import Part, part_of
from .adafactor import FACTOR_AXES
from .base import RowUpdates, State, TwoPassRule, Update, numel, scalar
from .precision import moments_dtype, moments_itemsize

ROW, COLUMN = FACTOR_AXES
KEY, SCALES = "exp_avg", "exp_avg_scales"
#: Accepted numbers of bits; 32 stores the momentum in `moments_dtype`.
BITS = (4, 8, 32)


@dataclass(frozen=True)
class CautiousFactored(TwoPassRule):
    """The rule's hyper-parameters.

    Attributes:
        lr: learning rate.
        betas: (b1, b2).
        eps: the denominator's constant.
        weight_decay: decoupled, times lr, before the update.
        cautious: entries whose momentum disagrees with the gradient rest.
        bits: of the stored momentum, one of `BITS`.
        min_quantized_size: a gradient with fewer entries has a momentum of `moments_dtype`.
        moments_dtype: precision of a momentum that isn't quantised, None for the default.
    """

    matrices_only: ClassVar[bool] = True
    SCRATCH: ClassVar[int] = 4

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    cautious: bool = True
    bits: int = 4
    min_quantized_size: int = 4096
    moments_dtype: torch.dtype | None = None

    def _quantizes(self, shape: Sequence[int]) -> bool:
        return self.bits in row_quantized.LARGEST and numel(shape) >= self.min_quantized_size

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero factors and a zero momentum."""
        wide, (m, n) = wide_dtype(like), shape
        state: State = {
            key: torch.zeros(shape[axis], dtype=wide, device=like.device)
            for key, axis in FACTOR_AXES.items()
        }
        if self._quantizes(shape):
            state[KEY], state[SCALES] = row_quantized.empty(m, n, self.bits, like.device)
        else:
            dtype = moments_dtype(self.moments_dtype, like.dtype)
            state[KEY] = torch.zeros(m, n, dtype=dtype, device=like.device)
        return state

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Factors and momentum."""
        m, n = shape
        factors = (m + n) * max(itemsize, 4)
        if self._quantizes(shape):
            return factors + m * row_quantized.row_bytes(n, self.bits)
        return factors + m * n * moments_itemsize(self.moments_dtype, itemsize)

    def deciding_for(self, shape: Sequence[int]) -> Self:
        """See `UpdateRule.deciding_for`: whether the momentum is quantised."""
        return replace(self, min_quantized_size=0 if self._quantizes(shape) else sys.maxsize)

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: of the factors the one that belongs to the axis."""
        if key in FACTOR_AXES:
            return 0 if FACTOR_AXES[key] == axis else None
        return axis

    def held(self, key: str, part: Part) -> int:
        """See `UpdateRule.held`: of columns their bytes and blocks."""
        count = super().held(key, part)
        if part.axis != 1 or key in FACTOR_AXES or not self._quantizes(part.shape):
            return count
        if key == SCALES:
            return row_quantized.blocks(count)
        return row_quantized.code_bytes(count, self.bits)

    def check_part(self, part: Part, called: str) -> None:
        """See `UpdateRule.check_part`: a block of quantised momentum lies on one process."""
        if not part.transposed or part.axis is None or not self._quantizes(part.shape):
            return
        share = -(-part.shape[0] // part.processes.world)
        if share % row_quantized.WIDTH and part.processes.world > 1:
            raise ValueError(
                f"{called} is spread by columns, {share} a process, which cuts blocks of "
                f"{row_quantized.WIDTH} of a momentum in {self.bits} bits: accepted are "
                f"momentum_bits=32, multiples of {row_quantized.WIDTH} columns a process, or "
                "parameters spread by rows, Shard(0)"
            )

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: sums along the spread axis, and the mean over rows."""
        if part.axis is None:
            return 0
        other = part.shape[1 - part.axis]
        by_columns = part.transposed == (part.axis == 0)
        numbers = other * (2 if self.cautious else 1) if by_columns else other + 1
        return numbers * max(itemsize, 4)

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first the second moment, then single rows."""
        part = part_of(state) or Part.whole(grad.shape)
        if part.transposed:
            return self._by_columns(grad, state, part)
        own = _Own(grad, state, part, part.start if part.axis == 0 else 0)
        return self._updates(own)

    def _by_columns(self, grad: Tensor, state: State, part: Part) -> RowUpdates:
        """Updates of a matrix whose columns are spread, at once: rows as it is seen are columns."""
        lying = {key: v.mT if key in (KEY, SCALES) else v for key, v in state.items()}
        lying[ROW], lying[COLUMN] = state[COLUMN], state[ROW]
        whole = self._updates(_Own(grad.mT, lying, part.mirror(), 0))(slice(0, grad.shape[1]))
        return lambda rows: replace(whole, direction=whole.direction[:, rows].mT)

    def _updates(self, own: _Own) -> RowUpdates:
        by_row, by_column = self._roots(own)
        lr = scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        direct = self._quantized if SCALES in own.state else self._stored

        def update(rows: slice) -> Update:
            return Update(direct(own, rows, by_row[rows], by_column), lr, decay_factor)

        return update

    def _quantized(self, own: _Own, rows: slice, by_row: Tensor, by_column: Tensor) -> Tensor:
        """The direction of some rows; their quantised momentum is advanced."""
        grad, state, part = own.grad[rows], own.state, own.part
        direction = torch.empty(grad.shape, dtype=by_row.dtype, device=grad.device)
        spread = part.axis == 1
        beta1, count = self.betas[0], int(state["step"])
        stride = part.shape[1]
        first = (own.start + rows.start) * stride + (part.start if spread else 0)
        torch.ops.lowrank.cautious_rows(
            *(grad, state[KEY][rows], state[SCALES][rows], by_row, by_column, direction),
            *(self.bits, self.cautious and not spread, 1 - beta1, self.eps, 1 - beta1**count),
            *(signed_seed(row_quantized.seed_of(count)), first, stride),
        )
        return self._cautious(direction, grad, part) if self.cautious and spread else direction

    def _stored(self, own: _Own, rows: slice, by_row: Tensor, by_column: Tensor) -> Tensor:
        """The direction of some rows; their momentum is advanced as it is stored."""
        stored: Tensor = own.state[KEY][rows]
        grad = own.grad[rows].to(by_row.dtype)
        beta1 = self.betas[0]
        moment = advance(stored.to(grad.dtype, copy=True), grad, 1 - beta1)
        stored.copy_(moment)
        correction = 1 - beta1 ** int(own.state["step"])
        direction = directed(moment, by_row, by_column, self.eps, correction)
        return self._cautious(direction, grad, own.part) if self.cautious else direction

    def _roots(self, own: _Own) -> tuple[Tensor, Tensor]:
        """Advances the second moment; roots of its factors by row and column."""
        part, beta2 = own.part, self.betas[1]
        row_m, column_n = own.state[ROW], own.state[COLUMN]
        m, n = part.shape
        row_sums, column_sums = torch.empty_like(row_m), torch.zeros_like(column_n)
        for rows in row_chunks(own.grad):
            square = own.grad[rows].to(row_m.dtype).square()
            torch.sum(square, 1, out=row_sums[rows])
            column_sums += square.sum(0)
        row_m.lerp_(part.sum_along(1, row_sums).div_(n), 1 - beta2)
        column_n.lerp_(part.sum_along(0, column_sums).div_(m), 1 - beta2)
        mean = part.sum_along(0, row_m.sum()).div_(m).clamp_(min=torch.finfo(row_m.dtype).tiny)
        correction = 1 - beta2 ** int(own.state["step"])
        return (row_m / mean).sqrt_(), (column_n / correction).sqrt_()

    @staticmethod
    def _cautious(direction: Tensor, grad: Tensor, part: Part) -> Tensor:
        """Masked in place, with counts over whole rows."""
        agrees = agreeing(direction, grad)
        counts = part.sum_along(1, agrees.sum(1, keepdim=True).to(direction.dtype))
        return direction.mul_(cautious_factors(agrees, counts, part.shape[1]))

    def first_moment(self, state: State) -> Tensor | None:
        """The momentum, dequantised."""
        stored: Tensor = state[KEY]
        if SCALES not in state:
            return stored
        part = part_of(state)
        transposed = part is not None and part.transposed
        codes, scales = (state[key].mT if transposed else state[key] for key in (KEY, SCALES))
        columns = len(state[ROW if transposed else COLUMN])
        moment = row_quantized.dequantize(codes, scales, columns, self.bits)
        return moment.mT if transposed else moment


@dataclass(frozen=True)
class _Own:
    """What is here of one matrix, as it lies.

    Attributes:
        grad: the gradient.
        state: local tensors; their rows are the gradient's.
        part: which part of the matrix this is.
        start: the first row, in the whole matrix.
    """

    grad: Tensor
    state: State
    part: Part
    start: int
