"""Adafactor with factored second moments (Shazeer and Stern, 2018), on gradient or projection.

    b2t = 1 - t^decay_rate,  A = G o G + eps1
    row <- b2t row + (1 - b2t) mean_columns(A),  col <- b2t col + (1 - b2t) mean_rows(A)
    U = G o rsqrt(row / mean(row)) o rsqrt(col),  U <- U / max(1, RMS(U) / clip_threshold)
    U <- lr_t U;  with beta1: E <- beta1 E + (1 - beta1) U, U = E
    W <- (1 - lr_t wd) W - U    (a projected U is scaled and back-projected)

lr_t is `lr` (or min(1e-2, 1/sqrt(t)) with `relative_step`), times max(eps2, RMS(W)) with
`scale_parameter`. A 1-D gradient keeps its whole second moment. Memory for a x b entries: a + b,
plus a b with `beta1`; half-precision gradients keep fp32 state, as in the official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.rotation import Rotation
from ..engine.sharding import Part, part_of
from .base import RowUpdates, State, Update, UpdateRule, numel, scalar, steps_done
from .precision import moments_itemsize
from .rows import state_rows, sum_of_squares

#: The factors of a matrix's second moment, and the axis that each has an entry for.
FACTOR_AXES = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1}


@dataclass(frozen=True)
class Adafactor(UpdateRule):
    """Adafactor's hyper-parameters, named as in `transformers`.

    Attributes:
        lr: learning rate, or None with `relative_step`.
        eps: (eps1, added to squared gradients; eps2, floor of the parameter's scale).
        clip_threshold: largest RMS of an update.
        decay_rate: exponent of the second moment's decay, negative.
        beta1: decay of the first moment, None for none.
        weight_decay: decoupled, times lr_t, before the update.
        scale_parameter: multiply lr by the parameter's RMS.
        relative_step: a time-dependent lr instead of a given one.
        warmup_init: with `relative_step`, start from 1e-6 t.
        moments_dtype: precision of the first moment, fp32 (fp64 under fp64 weights) when None.
        restarts: the second moment's decay counts from the last refresh (moments="reset").
    """

    SCRATCH: ClassVar[int] = 3
    #: LDAdam's rotation requires an unfactored second moment.
    transports: ClassVar[tuple[str, ...]] = ("keep", "reset", "restore")

    lr: float | Tensor | None
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False
    restarts: bool = False
    moments_dtype: torch.dtype | None = None

    def _shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        shape = tuple(shape)
        if len(shape) < 2:
            shapes = {"exp_avg_sq": shape}
        else:
            shapes = {
                "exp_avg_sq_row": shape[:-1],
                "exp_avg_sq_col": shape[:-2] + shape[-1:],
            }
        if self.beta1 is not None:
            shapes["exp_avg"] = shape
        return shapes

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero factors (and first moment) in fp32, or fp64 for fp64 parameters."""
        wide = wide_dtype(like)
        own = {"exp_avg": self.moments_dtype or wide}
        return {
            key: torch.zeros(size, dtype=own.get(key, wide), device=like.device)
            for key, size in self._shapes(shape).items()
        }

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: sums along the spread axis, and numbers."""
        numbers = 1 if self.scale_parameter else 0  # the weight's RMS
        sums = 0
        if part.axis is not None:
            numbers += 1  # the update's RMS
            if len(part.shape) == 2:
                sums = part.shape[1 - part.axis]
                numbers += 1 if part.axis == 0 else 0  # the mean over rows
        return (numbers + sums) * max(itemsize, 4)

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: of a matrix's factors, the one that belongs to the axis."""
        if len(shape) == 2 and key in FACTOR_AXES:
            return 0 if FACTOR_AXES[key] == axis else None
        return super().spread(key, axis, shape)

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Factors and first moment."""
        shapes = self._shapes(shape)
        own = {"exp_avg": moments_itemsize(self.moments_dtype, itemsize)}
        return sum(own.get(key, max(itemsize, 4)) * numel(size) for key, size in shapes.items())

    def _rate(self, state: State, weight: Tensor) -> float | Tensor:
        count = float(state["step"])
        if self.relative_step:
            limit = 1e-6 * count if self.warmup_init else 1e-2
            rate = min(limit, float(count**-0.5))
        else:
            assert self.lr is not None
            rate = scalar(self.lr)
        if not self.scale_parameter:
            return rate
        return self._weight_rms(state, weight).clamp(min=self.eps[1]).mul(rate)

    def _weight_rms(self, state: State, weight: Tensor) -> Tensor:
        total, part = sum_of_squares(weight), part_of(state)
        if part is None:
            return total.div(weight.numel()).sqrt()
        return part.processes.sum(total).div(part.weight_entries).sqrt()

    def _decay(self, state: State) -> float:
        return 1.0 - float(float(steps_done(state, self.restarts)) ** self.decay_rate)

    def _factors(
        self, grad_mn: Tensor, state: State, decay: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advances a matrix's second moment; returns the factors by row and column, and 1 / L.

        L = max(1, RMS(U) / clip_threshold). G is read twice, in chunks of rows.
        """
        part = part_of(state) or Part.whole(grad_mn.shape)
        m, n = part.shape
        row_m, col_n = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row_sums, col_sums = torch.empty_like(row_m), torch.zeros_like(col_n)
        for rows in row_chunks(grad_mn):
            square = grad_mn[rows].to(row_m.dtype).square()
            torch.sum(square, 1, out=row_sums[rows])
            col_sums += square.sum(0)
        row_sums, col_sums = part.sum_along(1, row_sums), part.sum_along(0, col_sums)
        row_m.lerp_(row_sums.div_(n).add_(self.eps[0]), 1 - decay)
        col_n.lerp_(col_sums.div_(m).add_(self.eps[0]), 1 - decay)
        mean = part.sum_along(0, row_m.sum()).div(m)
        by_row, by_col = (row_m / mean).rsqrt_(), col_n.rsqrt()
        total = torch.zeros((), dtype=row_m.dtype, device=row_m.device)
        for rows in row_chunks(grad_mn):
            chunk = (grad_mn[rows].to(row_m.dtype) * by_row[rows, None]).mul_(by_col)
            total += torch.linalg.vector_norm(chunk).square()
        size = part.spread.sum(total).div_(m * n).sqrt_()
        return by_row, by_col, size.div_(self.clip_threshold).clamp_(min=1.0).reciprocal_()

    def _normalise(self, grad: Tensor, state: State, decay: float) -> Tensor:
        """The clipped, normalised update of a non-2-d gradient; advances the second moment."""
        square = grad.square().add_(self.eps[0])
        if grad.dim() < 2:
            second: Tensor = state["exp_avg_sq"]
            second.lerp_(square, 1 - decay)
            direction = grad * second.rsqrt()
        else:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.lerp_(square.mean(-1), 1 - decay)
            col.lerp_(square.mean(-2), 1 - decay)
            by_row = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            direction = torch.mul(grad, by_row, out=square).mul_(col.rsqrt().unsqueeze(-2))
        part = part_of(state) or Part.whole(direction.shape)
        size = torch.linalg.vector_norm(direction)
        if not part.spread.alone:
            size = part.spread.sum(size.square()).sqrt_()
        size = size / torch.Size(part.shape).numel() ** 0.5
        return direction.div_((size / self.clip_threshold).clamp_(min=1.0))

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: first the factors of the second moment, then single rows."""
        rate = self._rate(state, weight)
        by_row, by_col, clip = self._factors(grad, state, self._decay(state))
        size = rate * clip

        def update(rows: slice) -> Update:
            direction = (grad[rows].to(by_row.dtype) * by_row[rows, None]).mul_(by_col).mul_(size)
            return self._finished(state_rows(state, rows, grad), direction, rate)

        return update

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        updates = []
        for grad, state, weight in zip(grads, states, weights, strict=True):
            if grad.dim() == 2:
                updates.append(self.by_rows(grad, state, weight)(slice(0, len(grad))))
                continue
            rate = self._rate(state, weight)
            wide = grad.to(wide_dtype(grad))
            direction = self._normalise(wide, state, self._decay(state)).mul_(rate)
            updates.append(self._finished(state, direction, rate))
        return updates

    def _joins(self, dim: int) -> bool:
        """Whether there is a form of the update for matrices as one tensor."""
        plain = type(self) is Adafactor and self.beta1 is None and not self.scale_parameter
        return plain and dim == 2

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """See `UpdateRule.scratch_bytes`: directions in fp32, then in the weight's type."""
        if not self._joins(2):
            return super().scratch_bytes(dtype, state, overwrites=overwrites)
        own, wide = dtype.itemsize, wide_dtype(dtype).itemsize
        if own == wide:
            return wide * (1 if overwrites else 2)
        return own + wide + (0 if overwrites else own)

    def update_together(
        self,
        grads_b: Tensor,
        states: Sequence[State],
        weights: Sequence[Tensor],
        axis: int | None = None,
        good_b: Tensor | None = None,
        *,
        overwrites: bool = False,
    ) -> Update:
        """See `UpdateRule.update_together`."""
        if not self._joins(grads_b.dim() - 1):
            return super().update_together(grads_b, states, weights, axis, good_b)
        rate, weight = self._rate(states[0], weights[0]), 1 - self._decay(states[0])
        wide = states[0]["exp_avg_sq_row"].dtype
        factors: list[Tensor] = []
        for key, dim in (("exp_avg_sq_row", 2), ("exp_avg_sq_col", 1)):
            stored: list[Tensor] = [state[key] for state in states]
            squares_b = torch.linalg.vector_norm(grads_b, dim=dim, dtype=wide).square_()
            # Their mean and eps[0], in one launch.
            means_b = torch.rsub(squares_b, self.eps[0], alpha=-1.0 / grads_b.shape[dim])
            torch._foreach_lerp_(stored, list(means_b.unbind(0)), weight)
            factors.append(torch.stack(stored))
        row_b, col_b = factors
        by_row_b = row_b.div_(row_b.mean(1, keepdim=True)).rsqrt_().unsqueeze(2)
        free = overwrites and grads_b.dtype == wide
        direction_b = torch.mul(grads_b, by_row_b, out=grads_b if free else None)
        direction_b.mul_(col_b.rsqrt_().unsqueeze(1))
        sizes_b = torch.linalg.vector_norm(direction_b, dim=(1, 2), keepdim=True)
        most = self.clip_threshold * math.prod(direction_b.shape[1:]) ** 0.5
        # Divides by max(1, RMS / threshold), and times the rate.
        scales_b = sizes_b.clamp_(min=most).reciprocal_().mul_(rate * most)
        if good_b is not None:
            scales_b.mul_(good_b.view(-1, 1, 1))
        return self._finished(states[0], direction_b.mul_(scales_b), rate)

    def _finished(self, state: State, direction: Tensor, rate: float | Tensor) -> Update:
        if self.beta1 is not None:
            direction = self._averaged(state, direction)
        decay_factor = 1.0 - rate * self.weight_decay if self.weight_decay else 1.0
        return Update(direction, 1.0, decay_factor, rate, rate)

    def _averaged(self, state: State, direction: Tensor) -> Tensor:
        """Advances the first moment by an update; returns a copy of the moment."""
        assert self.beta1 is not None
        moment: Tensor = state["exp_avg"]
        averaged = moment.to(direction.dtype, copy=True).lerp_(direction, 1 - self.beta1)
        moment.copy_(averaged)
        return averaged

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule`: transports the first moment, keeps the factors of the second.

        A factor of another length is transformed as variances are (`_transported_factor`).
        """
        if how == "reset":
            for key in state.keys() & {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}:
                state[key].zero_()
            return
        target = into or state
        if "exp_avg" in state:
            target["exp_avg"].copy_(rotation(state["exp_avg"]))
        for key in target.keys() & state.keys() & {"exp_avg_sq_row", "exp_avg_sq_col"}:
            if target is not state:
                target[key].copy_(_transported_factor(key, state[key], target[key].shape, rotation))


def _transported_factor(key: str, factor: Tensor, shape: torch.Size, rotation: Rotation) -> Tensor:
    """A factor of the second moment in other coordinates; new directions get its mean."""
    if factor.shape == shape:
        return factor
    if factor.dim() == 1:
        row = key.endswith("_row")
        rotation = Rotation(rotation.left if row else None, None if row else rotation.right)
    squared = rotation.squared()
    unseen = (1.0 - squared(torch.ones_like(factor))).clamp_(min=0.0)
    return squared(factor) + unseen * factor.mean()
