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
eight bits after its use (`rules.row_quantized`), or as it is. Memory: the factors, 4 (m + n) bytes,
and of M m (ceil(n bits / 8) + 4 ceil(n / 128)) bytes. No m x n temporary is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.sharding import Part, part_of
from . import row_quantized
from .adafactor import FACTOR_AXES
from .base import RowUpdates, State, TwoPassRule, Update, numel, scalar
from .precision import moments_dtype, moments_itemsize

ROW, COLUMN = FACTOR_AXES
KEY, SCALES = "exp_avg", "exp_avg_scales"
#: Accepted numbers of bits; 32 stores the momentum in `moments_dtype`.
BITS = (4, 8, 32)
#: Least share of a row's entries that its update is divided by.
LEAST_SHARE = 1e-3


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
        beta1, count = self.betas[0], int(own.state["step"])
        correction = 1 - beta1**count
        lr = scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0

        def update(rows: slice) -> Update:
            chunk = own.grad[rows].to(by_row.dtype)
            moment = self._load(own, rows).to(chunk.dtype).lerp_(chunk, 1 - beta1)
            self._save(own, rows, moment)
            denominator = (by_row[rows, None] * by_column).add_(self.eps)
            direction = moment.div_(denominator.mul_(correction))
            if self.cautious:
                direction.mul_(self._caution(direction, chunk, own.part))
            return Update(direction, lr, decay_factor)

        return update

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
    def _caution(direction: Tensor, grad: Tensor, part: Part) -> Tensor:
        """K over its mean in each row."""
        agrees = (direction.sign() * grad.sign() > 0).to(direction.dtype)
        counts = part.sum_along(1, agrees.sum(1, keepdim=True))
        return agrees.div_(counts.div_(part.shape[1]).clamp_(min=LEAST_SHARE))

    def _load(self, own: _Own, rows: slice) -> Tensor:
        """Some rows of the momentum, a new tensor."""
        stored: Tensor = own.state[KEY][rows]
        if SCALES not in own.state:
            return stored.clone()
        scales: Tensor = own.state[SCALES][rows]
        return row_quantized.dequantize(stored, scales, own.grad.shape[1], self.bits)

    def _save(self, own: _Own, rows: slice, moment: Tensor) -> None:
        stored: Tensor = own.state[KEY]
        if SCALES not in own.state:
            stored[rows] = moment
            return
        noise = own.noise(rows) if self.bits == min(BITS) else None
        stored[rows], own.state[SCALES][rows] = row_quantized.quantize(moment, self.bits, noise)

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

    def noise(self, rows: slice) -> Tensor:
        """For stochastic rounding of some rows in this step."""
        part, columns = self.part, self.grad.shape[1]
        first = part.start if part.axis == 1 else 0
        return row_quantized.noise_of(
            range(self.start + rows.start, self.start + rows.stop),
            range(first, first + columns),
            part.shape[1],
            int(self.state["step"]),
            self.grad.device,
        )
