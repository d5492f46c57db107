"""Adafactor with factored second moments (Shazeer and Stern, 2018), on gradient or projection.

    b2t = 1 - t^decay_rate,  A = G o G + eps1
    row <- b2t row + (1 - b2t) mean_columns(A),  col <- b2t col + (1 - b2t) mean_rows(A)
    U = G o rsqrt(row / mean(row)) o rsqrt(col),  U <- U / max(1, RMS(U) / clip_threshold)
    U <- lr_t U;  with beta1: E <- beta1 E + (1 - beta1) U, U = E
    W <- (1 - lr_t wd) W - scale up(U)

lr_t is `lr` (or min(1e-2, 1/sqrt(t)) with `relative_step`), times max(eps2, RMS(W)) with
`scale_parameter`. A 1-D gradient keeps its whole second moment. Memory for a x b entries: a + b,
plus a b with `beta1`; half-precision gradients keep fp32 state, as in the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.rotation import Rotation
from .base import State, Update, UpdateRule, numel, scalar, steps_done


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
        restarts: the second moment's decay counts from the last refresh (moments="reset").
    """

    #: LDAdam's rotation needs an unfactored second moment.
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

    @staticmethod
    def _dtype(like: torch.dtype) -> torch.dtype:
        return torch.float64 if like == torch.float64 else torch.float32

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
        dtype = self._dtype(like.dtype)
        return {
            key: torch.zeros(size, dtype=dtype, device=like.device)
            for key, size in self._shapes(shape).items()
        }

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Factors and first moment."""
        return max(itemsize, 4) * sum(numel(size) for size in self._shapes(shape).values())

    def _rate(self, step: Tensor, weight: Tensor) -> float | Tensor:
        count = float(step)
        if self.relative_step:
            limit = 1e-6 * count if self.warmup_init else 1e-2
            rate = min(limit, float(count**-0.5))
        else:
            assert self.lr is not None
            rate = scalar(self.lr)
        if not self.scale_parameter:
            return rate
        return self._weight_rms(weight).clamp(min=self.eps[1]).mul(rate)

    def _weight_rms(self, weight: Tensor) -> Tensor:
        return _rms(weight.to(self._dtype(weight.dtype)))

    def _normalise(self, grad: Tensor, state: State, decay: float) -> Tensor:
        """The gradient over its factored root mean square; advances the factors."""
        square = grad.square().add_(self.eps[0])
        if grad.dim() < 2:
            second: Tensor = state["exp_avg_sq"]
            second.lerp_(square, 1 - decay)
            return grad * second.rsqrt()
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row.lerp_(square.mean(-1), 1 - decay)
        col.lerp_(square.mean(-2), 1 - decay)
        row_factor = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        return torch.mul(grad, row_factor, out=square).mul_(col.rsqrt().unsqueeze(-2))

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        updates = []
        for grad, state, weight in zip(grads, states, weights, strict=True):
            rate = self._rate(state["step"], weight)
            decay = 1.0 - float(steps_done(state, self.restarts)) ** self.decay_rate
            direction = self._normalise(grad.to(self._dtype(grad.dtype)), state, decay)
            direction.div_((_rms(direction) / self.clip_threshold).clamp_(min=1.0)).mul_(rate)
            if self.beta1 is not None:
                direction = self._averaged(state, direction)
            decay_factor = 1.0 - rate * self.weight_decay if self.weight_decay else 1.0
            updates.append(Update(direction, 1.0, decay_factor, rate, rate))
        return updates

    def _averaged(self, state: State, direction: Tensor) -> Tensor:
        """Advances the first moment by an update; a copy of it."""
        assert self.beta1 is not None
        moment: Tensor = state["exp_avg"]
        return moment.lerp_(direction, 1 - self.beta1).clone()

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule`: the first moment is transported, the factors of the second stay.

        A factor of another length is moved as variances are (`_moved_factor`).
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
                target[key].copy_(_moved_factor(key, state[key], target[key].shape, rotation))


def _moved_factor(key: str, factor: Tensor, shape: torch.Size, rotation: Rotation) -> Tensor:
    """A factor of the second moment in other coordinates; new directions get its mean."""
    if factor.shape == shape:
        return factor
    if factor.dim() == 1:
        row = key.endswith("_row")
        rotation = Rotation(rotation.left if row else None, None if row else rotation.right)
    squared = rotation.squared()
    unseen = (1.0 - squared(torch.ones_like(factor))).clamp_(min=0.0)
    return squared(factor) + unseen * factor.mean()


def _rms(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.div(tensor.numel() ** 0.5)
