"""RACS: a gradient scaled by its rows and columns, with one number kept for each.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
Low-Rank Extension" (arXiv 2502.07752). The squared gradient is approximated by q s^T, q for rows
and s for columns, by five rounds from q = 1 of

    s_j = sum_i q_i G_ij^2 / ||q||^2,    q_i = sum_j s_j G_ij^2 / ||s||^2

and averaged: s^ <- b s^ + (1 - b) s, q^ alike, without bias correction. Then

    U = scale G_ij / sqrt(q^_i s^_j), its norm limited to grow by 1 % a step
    W <- (1 - lr wd) W - lr U

Rows and columns without any gradient so far don't move; where a whole gradient is zero, or its
squares overflow, the averages stay as they are. Memory: m + n + 1 fp32 entries. G is read in chunks
of rows, seven times; no m x n temporary is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.sharding import Part, part_of
from .adafactor import FACTOR_AXES
from .base import RowUpdates, State, TwoPassRule, Update, scalar
from .growth import limit_growth

ROUNDS = 5
ROW, COLUMN = FACTOR_AXES
NORM_KEY = "update_norm"


@dataclass(frozen=True)
class RowColumnScaled(TwoPassRule):
    """RACS's hyper-parameters.

    Attributes:
        lr: learning rate.
        beta: decay of the averages of s and q.
        scale: factor on the update.
        limiter: largest growth of the update's norm in one step, at least 1; None for no limit.
        weight_decay: decoupled, times lr, before the update.
    """

    matrices_only: ClassVar[bool] = True

    lr: float | Tensor
    beta: float = 0.9
    scale: float = 0.05
    limiter: float | None = 1.01
    weight_decay: float = 0.0

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero averages, and no norm yet."""
        wide = wide_dtype(like)
        state: State = {
            key: torch.zeros(shape[axis], dtype=wide, device=like.device)
            for key, axis in FACTOR_AXES.items()
        }
        if self.limiter is not None:
            state[NORM_KEY] = torch.zeros((), dtype=torch.float32, device=like.device)
        return state

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """A number for each row and column, and the norm."""
        return sum(shape) * max(itemsize, 4) + (0 if self.limiter is None else 4)

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: the averages that belong to the axis."""
        return 0 if FACTOR_AXES.get(key) == axis else None

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: in each round sums along the spread axis, and a norm."""
        if part.axis is None:
            return 0
        other = part.shape[1 - part.axis]
        # Seen as its transpose the rounds begin without a sum, and end with one.
        rounds = ROUNDS * (other + 1) + (0 if part.transposed else -1)
        limited = 0 if self.limiter is None else 1
        return (rounds + 1) * max(itemsize, 4) + limited * max(itemsize, 4)

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first the factors of rows and columns, then single rows."""
        part = part_of(state) or Part.whole(grad.shape)
        own, other = fixed_point(grad, part)
        means = state[ROW], state[COLUMN]
        known = part.sum_along(0, own.sum()) + other.sum()
        usable = (known > 0) & known.isfinite()
        for mean, new in zip(means, (own, other), strict=True):
            mean.copy_(torch.where(usable, mean.lerp(new.to(mean.dtype), 1 - self.beta), mean))
        by_row, by_column = (torch.where(mean > 0, mean.rsqrt(), 0.0) for mean in means)

        def scaled(rows: slice) -> Tensor:
            return (grad[rows].to(by_row.dtype) * by_row[rows, None]).mul_(by_column)

        size: Tensor | float = self.scale
        if self.limiter is not None:
            total = torch.zeros((), dtype=by_row.dtype, device=grad.device)
            for rows in row_chunks(grad):
                total += scaled(rows).square_().sum()
            norm = part.spread.sum(total).sqrt().float()
            size = limit_growth(state[NORM_KEY], norm, self.limiter).to(by_row.dtype) * self.scale
        lr = scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        return lambda rows: Update(scaled(rows).mul_(size), lr, decay_factor)


def fixed_point(grad: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """q and s of the module, as the gradient is seen: (by its rows, by its columns).

    Args:
        grad: this process's part of the gradient.
        part: which one; of a transposed weight the rounds begin with what is seen as columns.
    """
    wide = wide_dtype(grad)
    by_row = torch.ones(len(grad), dtype=wide, device=grad.device)
    by_column = torch.ones(grad.shape[1], dtype=wide, device=grad.device)
    tiny = torch.finfo(wide).tiny
    if not part.transposed:
        squares = _sweep(grad, by_row, None)[1]
        by_column = part.sum_along(0, squares) / max(part.shape[0], 1)
    for round_ in range(ROUNDS):
        weighted = by_column / by_column.square().sum().clamp(min=tiny)
        by_row, squares = _sweep(grad, by_row, weighted)
        last = round_ == ROUNDS - 1
        if last and not part.transposed:
            break  # s is of the round's begin, q of its end
        sums = torch.cat([squares, by_row.square().sum().view(1)])
        sums = part.sum_along(0, sums)
        by_column = sums[:-1] / sums[-1].clamp(min=tiny)
    return by_row, by_column


def _sweep(grad: Tensor, by_row: Tensor, weighted: Tensor | None) -> tuple[Tensor, Tensor]:
    """One pass: new factors of rows, unless `weighted` is None, and with them sums by column."""
    made = by_row if weighted is None else torch.empty_like(by_row)
    sums = torch.zeros(grad.shape[1], dtype=made.dtype, device=grad.device)
    for rows in row_chunks(grad):
        square = grad[rows].to(made.dtype).square()
        if weighted is not None:
            torch.mv(square, weighted, out=made[rows])
        sums += made[rows] @ square
    return made, sums
