"""Adam whose moments are folded: one entry for each block of 2^level neighbours in a row.

With blocks along the weight's last dimension, F the mean of a block's entries, and E its inverse
image (each entry repeated), D = G - E F(G):

    mean (FOAM, arXiv 2512.07112):
        M <- b1 M + (1 - b1) F(G),  V <- b2 V + (1 - b2) F(G o G)
        U = (E M / c1 + c D) / (sqrt(E V / c2^2 + c^2 D o D) + eps)
    haar (GWT, arXiv 2501.07237), with A = sqrt(size) F(G), a block's Haar approximation:
        M <- b1 M + (1 - b1) A,  V <- b2 V + (1 - b2) A o A
        U = E (M / c1 / (sqrt(size) (sqrt(V) / c2 + eps))) + c D / (E sqrt(V) / c2 + eps),
        the norm of U limited to grow by 1 % a step
    W <- (1 - lr wd) W - lr scale U,    c1 = 1 - b1^t,  c2 = sqrt(1 - b2^t)

The Haar transform itself isn't needed: a block's details at all levels share its V, and together
they are D. The last block of a row whose length 2^level doesn't divide has the rest of the entries
(size above is its own). Memory: 2 m ceil(n / 2^level) entries of `moments_dtype`, and one fp32
number with the limiter. Rows are worked on in chunks; no m x n temporary is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.sharding import Part, part_of
from .base import RowUpdates, State, TwoPassRule, Update, UpdateRule, scalar
from .fused_adam import bias_corrections
from .growth import limit_growth
from .precision import moments_dtype, moments_itemsize

FOLDS = ("mean", "haar")
NORM_KEY = "update_norm"


@dataclass(frozen=True)
class FoldedAdam(TwoPassRule):
    """Adam with folded moments.

    Attributes:
        lr: learning rate.
        betas: (b1, b2).
        eps: the denominator's constant.
        weight_decay: decoupled, times lr, before the update.
        fold: "mean" or "haar".
        level: blocks have 2^level entries; 0 is Adam.
        scale: factor on the update.
        residual_scale: c, factor on what the fold loses.
        limiter: of "haar", largest growth of the update's norm in one step; None for no limit.
        moments_dtype: precision of the moments, None for the default (`moments_dtype`).
    """

    matrices_only: ClassVar[bool] = True

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    fold: str = "mean"
    level: int = 2
    scale: float = 0.25
    residual_scale: float = 1.0
    limiter: float | None = 1.01
    moments_dtype: torch.dtype | None = None

    @property
    def width(self) -> int:
        """Entries of a block."""
        return int(2**self.level)

    @property
    def _limited(self) -> bool:
        return self.fold == "haar" and self.limiter is not None

    def blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return -(-columns // self.width)

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero moments, and no norm yet."""
        dtype = moments_dtype(self.moments_dtype, like.dtype)
        size = (shape[0], self.blocks(shape[1]))
        state: State = {
            key: torch.zeros(size, dtype=dtype, device=like.device)
            for key in ("exp_avg", "exp_avg_sq")
        }
        if self._limited:
            state[NORM_KEY] = torch.zeros((), dtype=torch.float32, device=like.device)
        return state

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Two folded moments, and the norm."""
        entries = 2 * shape[0] * self.blocks(shape[1])
        own = entries * moments_itemsize(self.moments_dtype, itemsize)
        return own + (4 if self._limited else 0)

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`."""
        return None if key == NORM_KEY else axis

    def held(self, key: str, part: Part) -> int:
        """See `UpdateRule.held`: of columns their blocks."""
        count = super().held(key, part)
        return self.blocks(count) if part.axis == 1 else count

    def check_part(self, part: Part, called: str) -> None:
        """See `UpdateRule.check_part`: blocks lie on one process each."""
        if not part.transposed or part.axis is None:
            return
        share = -(-part.shape[0] // part.processes.world)
        if share % self.width and part.processes.world > 1:
            whole = (share & -share).bit_length() - 1
            raise ValueError(
                f"{called} is spread by columns, {share} a process, which cuts blocks of "
                f"{self.width} (fold_level={self.level}): accepted are fold_level of at most "
                f"{whole}, or parameters spread by rows, Shard(0)"
            )

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: the norm, if it is limited."""
        return max(itemsize, 4) if self._limited and part.axis is not None else 0

    def carry(self, previous: UpdateRule, old: State, new: State) -> bool:
        """See `UpdateRule.carry`: moments of another fold are of another scale."""
        same = isinstance(previous, FoldedAdam) and previous.fold == self.fold
        return same and super().carry(previous, old, new)

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first the moments, then single rows."""
        part = part_of(state) or Part.whole(grad.shape)
        beta1, beta2 = self.betas
        corrections = bias_corrections(beta1, beta2, int(state["step"]))
        # As the parameter lies: blocks are neighbours in its last dimension.
        lying = [t.mT if part.transposed else t for t in self._tensors(grad, state)]
        grad_kn, m_kb, v_kb = lying
        for rows in row_chunks(grad_kn):
            chunk = grad_kn[rows].to(wide_dtype(grad))
            first, second = self._folded(chunk)
            m_kb[rows] = m_kb[rows].to(chunk.dtype).lerp_(first, 1 - beta1)
            v_kb[rows] = v_kb[rows].to(chunk.dtype).lerp_(second, 1 - beta2)

        def direction(rows: slice) -> Tensor:
            if not part.transposed:
                return self._direction(grad_kn[rows], m_kb[rows], v_kb[rows], corrections)
            # Rows as they are seen are columns: those of the blocks that they belong to.
            start, stop = rows.start // self.width, self.blocks(rows.stop)
            first = start * self.width
            columns = slice(first, min(stop * self.width, grad_kn.shape[1]))
            made = self._direction(
                grad_kn[:, columns], m_kb[:, start:stop], v_kb[:, start:stop], corrections
            )
            return made[:, rows.start - first : rows.stop - first].mT

        size: Tensor | float = self.scale
        if self._limited:
            assert self.limiter is not None
            total = torch.zeros((), dtype=wide_dtype(grad), device=grad.device)
            for rows in row_chunks(grad):
                total += direction(rows).square_().sum()
            norm = part.spread.sum(total).sqrt().float()
            size = limit_growth(state[NORM_KEY], norm, self.limiter).to(total.dtype) * self.scale
        lr = scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        return lambda rows: Update(direction(rows).mul_(size), lr, decay_factor)

    def _tensors(self, grad: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        return grad, state["exp_avg"], state["exp_avg_sq"]

    def _sizes(self, columns: int, like: Tensor) -> Tensor:
        """Entries of each block of some columns, which begin with a block."""
        sizes = torch.full(
            (self.blocks(columns),), self.width, dtype=like.dtype, device=like.device
        )
        if columns % self.width:
            sizes[-1:] = columns % self.width
        return sizes

    def _means(self, chunk: Tensor) -> Tensor:
        """The mean of each block."""
        rows, columns = chunk.shape
        whole = columns - columns % self.width
        means = chunk[:, :whole].reshape(rows, -1, self.width).mean(-1)
        if whole == columns:
            return means
        return torch.cat([means, chunk[:, whole:].mean(-1, keepdim=True)], 1)

    def _spread_out(self, folded: Tensor, columns: int) -> Tensor:
        """E: each block's entry for each of its columns."""
        return folded.repeat_interleave(self.width, 1)[:, :columns]

    def _folded(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """What the moments average."""
        means = self._means(chunk)
        if self.fold == "mean":
            return means, self._means(chunk.square())
        approximation = means.mul_(self._sizes(chunk.shape[1], chunk).sqrt_())
        return approximation, approximation.square()

    def _direction(
        self, grad: Tensor, m: Tensor, v: Tensor, corrections: tuple[float, float]
    ) -> Tensor:
        """U of some rows and whole blocks."""
        correction1, correction2 = corrections
        chunk = grad.to(wide_dtype(grad))
        columns = chunk.shape[1]
        m, root = m.to(chunk.dtype) / correction1, v.to(chunk.dtype).sqrt().div_(correction2)
        outside = chunk - self._spread_out(self._means(chunk), columns)
        outside.mul_(self.residual_scale)
        if self.fold == "mean":
            squares = self._spread_out(root.square_(), columns) + outside.square()
            return outside.add_(self._spread_out(m, columns)).div_(squares.sqrt_().add_(self.eps))
        root.add_(self.eps)
        sizes = self._sizes(columns, chunk).sqrt_()
        inside = self._spread_out(m.div_(root).div_(sizes), columns)
        return outside.div_(self._spread_out(root, columns)).add_(inside)

    def first_moment(self, state: State) -> Tensor | None:
        """None: the folded one has another shape than the gradient."""
        return None
