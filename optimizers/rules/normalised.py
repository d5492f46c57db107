"""Stochastic gradient descent normalised by rows or columns, with or without momentum.

    M <- momentum M + (1 - momentum) G,  or M = G
    U_ij = M_ij / (rms of row i + eps)    (of column j with `axis="columns"`)
    W <- (1 - lr wd) W - lr U

Rows and columns are the weight's: a row belongs to an output of an `nn.Linear`, to a token of an
`nn.Embedding`. The update has entries of RMS 1, whatever the gradient's scale. Memory: none, or 1
entry of `moments_dtype` with momentum. No m x n temporary is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.sharding import Part, part_of
from .base import RowUpdates, State, TwoPassRule, Update, numel, scalar
from .precision import moments_dtype, moments_itemsize
from .rows import squares_along

#: What is normalised, and the axis of the weight that its mean square is taken along.
AXES = {"rows": 1, "columns": 0}


@dataclass(frozen=True)
class NormalisedSGD(TwoPassRule):
    """SGD of which each row, or column, has RMS 1.

    Attributes:
        lr: learning rate, a float or a 0-d tensor.
        axis: "rows" or "columns".
        momentum: decay of the moment, 0 for none.
        eps: added to the root mean squares; a zero row stays zero.
        weight_decay: decoupled, times lr, before the update.
        capturable: `lr` is never read back (CUDA graphs).
        moments_dtype: precision of the momentum, None for the default (`moments_dtype`).
    """

    matrices_only: ClassVar[bool] = True

    lr: float | Tensor
    axis: str = "rows"
    momentum: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    capturable: bool = False
    moments_dtype: torch.dtype | None = None

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """A zero momentum, or nothing."""
        if not self.momentum:
            return {}
        dtype = moments_dtype(self.moments_dtype, like.dtype)
        return {"momentum_buffer": torch.zeros(tuple(shape), dtype=dtype, device=like.device)}

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """One moment, or nothing."""
        if not self.momentum:
            return 0
        return numel(shape) * moments_itemsize(self.moments_dtype, itemsize)

    def _summed(self, part: Part) -> int:
        """The axis that squares are summed along, as the gradient is seen."""
        return 1 - AXES[self.axis] if part.transposed else AXES[self.axis]

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: nothing for rows of a matrix that is spread by rows."""
        summed = self._summed(part)
        return part.shape[1 - summed] * max(itemsize, 4) if summed == part.axis else 0

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first the mean squares, then single rows."""
        part = part_of(state) or Part.whole(grad.shape)
        source = self._averaged(grad, state) if self.momentum else grad
        summed = self._summed(part)
        squares = part.sum_along(summed, squares_along(source, summed))
        factors = squares.div_(part.shape[summed]).sqrt_().add_(self.eps).reciprocal_()
        lr: Any = self.lr if self.capturable else scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0

        def update(rows: slice) -> Update:
            own = factors[rows] if summed == 1 else factors
            return Update(source[rows].to(factors.dtype) * own, lr, decay_factor)

        return update

    def _averaged(self, grad: Tensor, state: State) -> Tensor:
        """Advances the momentum in place, and returns it."""
        moment: Tensor = state["momentum_buffer"]
        for rows in row_chunks(grad):
            wide = grad[rows].to(wide_dtype(grad))
            moment[rows] = moment[rows].to(wide.dtype).lerp(wide, 1 - self.momentum)
        return moment

    def first_moment(self, state: State) -> Tensor | None:
        """The momentum."""
        moment: Tensor | None = state.get("momentum_buffer")
        return moment
