"""Adam with bias corrections of each row, so that single rows can be reset (SwitchLoRA).

    W <- W - lr (M / c1) / (sqrt(V) / c2 + eps),  c1 = 1 - b1^t,  c2 = sqrt(1 - b2^t)

with t the row's step count.

Memory: 2 entries of `moments_dtype`, and 8 bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adam import Adam
from .base import State, Update, UpdateRule, scalar
from .updates import left_out, zeroed


@dataclass(frozen=True)
class VectorAdam(Adam):
    """Adam in torch's form on matrices with a step count for each row.

    State `row_steps` (r,) fp32: steps of each row's moments; `held` (r,) int32: number of further
    steps for which a row is frozen; `switched`: number of exchanged rows, mod r.
    """

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero moments and counts."""
        return super().init(shape, like) | {
            "row_steps": torch.zeros(shape[0], dtype=torch.float32, device=like.device),
            "held": torch.zeros(shape[0], dtype=torch.int32, device=like.device),
            "switched": 0,
        }

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Two moments, and two counts a row."""
        return super().state_bytes(shape, itemsize) + 8 * shape[0]

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        decay_factor, alpha = self._decay_and_alpha(scalar(self.lr))
        return [
            Update(self._direction(grad, state), alpha, decay_factor)
            for grad, state in zip(grads, states, strict=True)
        ]

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """See `UpdateRule.scratch_bytes`: without a kernel."""
        return UpdateRule.scratch_bytes(self, dtype, state, overwrites=overwrites)

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
        """See `UpdateRule.update_together`: one by one."""
        return UpdateRule.update_together(self, grads_b, states, weights, axis, good_b)

    def bounds_scratch(self, weight: Tensor, state: State) -> bool:
        """See `UpdateRule.bounds_scratch`: it takes some for each weight."""
        return False

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """See `UpdateRule.apply`."""
        flags = [None] * len(weights) if good_b is None else good_b.unbind()
        own = list(grads) if good_b is None else zeroed(grads, good_b)
        updates = map(left_out, self.update(own, states, weights), flags)
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(update.decay_factor).sub_(
                update.direction.to(weight.dtype), alpha=scalar(update.alpha)
            )

    def _direction(self, grad: Tensor, state: State) -> Tensor:
        beta1, beta2 = self.betas
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        # A held row's gradient counts as zero; the user's gradient is not modified.
        grad = grad.to(wide) * (state["held"] == 0).unsqueeze(1)
        state["row_steps"].add_(1)
        steps = state["row_steps"].to(wide).unsqueeze(1)
        m, v = (state[key].to(wide) for key in ("exp_avg", "exp_avg_sq"))  # themselves in fp32
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        for key, new in (("exp_avg", m), ("exp_avg_sq", v)):
            if state[key] is not new:
                state[key].copy_(new)
        denominator = v.sqrt().div_((1 - beta2**steps).sqrt_()).add_(self.eps)
        return torch.div(m, denominator, out=denominator).div_(1 - beta1**steps)
