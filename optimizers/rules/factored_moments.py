"""Adam whose moments are low-rank factors (LoRA-Pre): an average as an online regression.

"LoRA-Pre" (arXiv 2602.24283). With b1 = (1 - g1)^2 and b2 = (1 - g2)^4, at each step, all from the
factors before it, with A^+ = A^T (A A^T + ridge)^-1 and B^+ = (B^T B + ridge)^-1 B^T

    M = b1 B A + (1 - b1) G,    V = b2 (B' A') o (B' A') + (1 - b2) G o G
    B  <- (1 - g1) B  + g1 G A^+,      A  <- (1 - g1) A  + g1 B^+ G
    B' <- (1 - g2) B' + g2 |G| A'^+,   A' <- (1 - g2) A' + g2 B'^+ |G|
    W <- (1 - lr wd) W - lr M / c1 / (sqrt(V) / c2 + eps),    c1 = 1 - b1^t,  c2 = sqrt(1 - b2^t)

So B A follows Adam's first moment and B' A' the root of its second. B starts at zero and A at
random signs / sqrt(n), the first row of A' at 1 / sqrt(n), which catches the mean of |G| at once:
all of them zero would stay so, for the gradient enters through the other factor only. The same
signs for all matrices of a shape. The ridge is `ridge` times the mean of the Gram matrix's
diagonal: at rank-deficient gradients the factors' Gram matrices are singular. For B it is at least
1e-3 of the mean square of g G A^+: after steps without a gradient (an expert without tokens) B is
far smaller than a new gradient, B^+ G as much larger, and B A would be wrong by that ratio. After
each step A is scaled by one over its former size, and B by it, which B A doesn't feel.

Memory: 2 r (m + n) entries of `moments_dtype`. M and V are made in chunks of rows, never whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowrank.cuda import rademacher

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.fp32 import exact_fp32
from ..engine.sharding import Part, part_of
from .base import RowUpdates, State, TwoPassRule, Update, scalar
from .fused_adam import bias_corrections
from .precision import moments_dtype, moments_itemsize

#: Keys of the factors of each moment: (m x r, r x n).
FIRST = ("exp_avg_left", "exp_avg_right")
SECOND = ("exp_avg_sq_left", "exp_avg_sq_right")
#: Least ridge of B^T B, in units of the squared size of what a step adds to B.
JUMP = 1e-3
#: Seed of the signs that factors start from.
START = 20260224


@dataclass(frozen=True)
class FactoredAdam(TwoPassRule):
    """LoRA-Pre's hyper-parameters.

    Attributes:
        lr: learning rate.
        betas: (b1, b2).
        eps: the denominator's constant.
        weight_decay: decoupled, times lr, before the update.
        rank: r, clamped to each matrix.
        ridge: added to Gram matrices, relative to the mean of their diagonal.
        moments_dtype: precision of the factors, None for the default (`moments_dtype`).
        decided: `rank` is already that of the whole matrix, of which this is a part.
    """

    matrices_only: ClassVar[bool] = True

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rank: int = 128
    ridge: float = 1e-5
    moments_dtype: torch.dtype | None = None
    decided: bool = False

    def _rank(self, shape: Sequence[int]) -> int:
        return self.rank if self.decided else min(self.rank, *shape)

    def deciding_for(self, shape: Sequence[int]) -> Self:
        """See `UpdateRule.deciding_for`: the rank of the whole matrix."""
        return replace(self, rank=self._rank(shape), decided=True)

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero factors; the first step draws what they start from."""
        dtype, rank = moments_dtype(self.moments_dtype, like.dtype), self._rank(shape)
        sizes = ((shape[0], rank), (rank, shape[1]))
        return {
            key: torch.zeros(size, dtype=dtype, device=like.device)
            for pair in (FIRST, SECOND)
            for key, size in zip(pair, sizes, strict=True)
        }

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Two factors of each of two moments."""
        entries = 2 * self._rank(shape) * sum(shape)
        return entries * moments_itemsize(self.moments_dtype, itemsize)

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: the factor that belongs to the axis."""
        own = (FIRST[axis], SECOND[axis])
        return axis if key in own else None

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: for each moment a product and a Gram matrix."""
        if part.axis is None:
            return 0
        rank, sizes = self._rank(part.shape), 1 if (part.axis == 0) != part.transposed else 0
        return 2 * (rank * (rank + part.shape[1 - part.axis]) + sizes) * max(itemsize, 4)

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first the new factors, then single rows from the old ones."""
        part = part_of(state) or Part.whole(grad.shape)
        wide = wide_dtype(grad)
        if int(state["step"]) == 1:
            self._start(state, part)
        before = {key: state[key].to(wide, copy=True) for pair in (FIRST, SECOND) for key in pair}
        self._advance(grad, state, before, part)
        (b_kr, a_rn), (root_kr, root_rn) = ([before[key] for key in p] for p in (FIRST, SECOND))
        beta1, beta2 = self.betas
        correction1, correction2 = bias_corrections(beta1, beta2, int(state["step"]))
        lr = scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0

        def update(rows: slice) -> Update:
            chunk = grad[rows].to(wide)
            with exact_fp32():
                m = torch.addmm(chunk, b_kr[rows], a_rn, beta=1 - beta1, alpha=beta1)
                root = root_kr[rows] @ root_rn
            v = root.square_().mul_(beta2).addcmul_(chunk, chunk, value=1 - beta2)
            denominator = v.sqrt_().div_(correction2).add_(self.eps)
            return Update(m.div_(denominator).div_(correction1), lr, decay_factor)

        return update

    def _start(self, state: State, part: Part) -> None:
        """Writes what the factors of columns start from; those of rows stay zero."""
        place = 0 if part.transposed else 1
        for pair in (FIRST, SECOND):
            factor = state[pair[place]]
            factor = factor.mT if part.transposed else factor
            m, n = part.original_shape
            signs_rn = rademacher((len(factor), n), START + m, torch.float32, factor.device)
            if pair is SECOND:
                signs_rn[0] = 1.0
            whole = part.axis is None or part.axis != place
            held = signs_rn if whole else signs_rn[:, part.start : part.stop]
            factor.copy_(held.mul_(n**-0.5))

    @exact_fp32()
    def _advance(self, grad: Tensor, state: State, old: State, part: Part) -> None:
        """Writes the new factors."""
        products: list[tuple[Tensor, Tensor]] = [
            (torch.empty_like(old[pair[0]]), torch.zeros_like(old[pair[1]]))
            for pair in (FIRST, SECOND)
        ]
        for rows in row_chunks(grad, product=True):
            chunk = grad[rows].to(old[FIRST[0]].dtype, copy=True)
            for pair, (by_row, by_column) in zip((FIRST, SECOND), products, strict=True):
                chunk = chunk if pair is FIRST else chunk.abs_()
                torch.mm(chunk, old[pair[1]].mT, out=by_row[rows])
                by_column.addmm_(old[pair[0]][rows].mT, chunk)
        shares = (1 - self.betas[0] ** 0.5, 1 - self.betas[1] ** 0.25)
        for pair, (by_row, by_column), share in zip((FIRST, SECOND), products, shares, strict=True):
            b_kr, a_rn = (old[key] for key in pair)
            if part.transposed:  # seen are G^T, A^T and B^T
                lying = self._next(by_column.mT, by_row.mT, a_rn.mT, b_kr.mT, share, part)
                new_a, new_b = (factor.mT for factor in lying)
            else:
                new_b, new_a = self._next(by_row, by_column, b_kr, a_rn, share, part)
            state[pair[0]].copy_(new_b)
            state[pair[1]].copy_(new_a)

    def _next(
        self,
        by_row: Tensor,
        by_column: Tensor,
        b_mr: Tensor,
        a_rn: Tensor,
        share: float,
        part: Part,
    ) -> tuple[Tensor, Tensor]:
        """The next B and A.

        Args:
            by_row: this process's part of G A^T, m x r.
            by_column: the same of B^T G, r x n.
            b_mr: B.
            a_rn: A.
            share: g.
            part: what lies here of the gradient.
        """
        rows, columns = (1, 0) if part.transposed else (0, 1)
        # G A^T sums over columns, B^T G over rows, and so do the Gram matrices.
        by_row, gram_a = _summed(part, columns, by_row, a_rn @ a_rn.mT)
        size_a = gram_a.diagonal().mean()
        made_b = self._solved(gram_a, by_row.mT, size_a.new_zeros(())).mT
        added = made_b.square().sum().div(len(gram_a)).mul(JUMP * share * share)
        by_column, gram_b, added = _summed(part, rows, by_column, b_mr.mT @ b_mr, added)
        made_a = self._solved(gram_b, by_column, added)
        # B A stays the same when a number goes from one to the other: A keeps its size, so that
        # it outlives any number of steps without a gradient.
        root = size_a.sqrt().clamp(min=torch.finfo(size_a.dtype).tiny)
        return b_mr.lerp(made_b, share) * root, a_rn.lerp(made_a, share) / root

    def _solved(self, gram_rr: Tensor, right: Tensor, least: Tensor) -> Tensor:
        """(Gram + ridge)^-1 right with a ridge of at least `least`; zero where the Gram matrix is.

        Solved with a diagonal of about 1, so that neither tiny nor huge factors leave fp32's range.
        """
        tiny = torch.finfo(gram_rr.dtype).tiny
        mean = gram_rr.diagonal().mean()
        size = torch.maximum(mean, least).clamp(min=tiny)
        unit = gram_rr / size
        unit.diagonal().add_(torch.maximum(mean * self.ridge, least) / size)
        factor, _ = torch.linalg.cholesky_ex(unit)
        solved: Tensor = torch.cholesky_solve(right / size, factor)
        return torch.where(mean > tiny, solved, 0.0)

    def first_moment(self, state: State) -> Tensor | None:
        """None: it isn't stored as one."""
        return None


def _summed(part: Part, axis: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Completes sums along an axis, in one reduction."""
    if axis != part.axis or part.processes.alone:
        return tensors
    whole = part.processes.sum(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return tuple(own.view(tensor.shape) for own, tensor in zip(parts, tensors, strict=True))
