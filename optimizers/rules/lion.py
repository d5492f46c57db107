"""Lion: the sign of an interpolated momentum (Chen et al., 2023, arXiv 2302.06675).

    U = sign(b1 M + (1 - b1) G),  M <- b2 M + (1 - b2) G
    W <- (1 - lr wd) W - lr U    (or the decay after the update, `decay_first=False`)

Memory: 1 entry of `moments_dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from ..engine.rotation import Rotation
from .base import MOMENT_TRANSPORTS, ElementwiseRule, State, Update, numel, scalar
from .precision import moments_dtype, moments_itemsize


@dataclass(frozen=True)
class Lion(ElementwiseRule):
    """Lion's hyper-parameters.

    Attributes:
        lr: learning rate, a float or a 0-d tensor.
        betas: (b1, of the update; b2, of the momentum).
        weight_decay: decoupled, times lr.
        decay_first: decay before the update rather than after it.
        signed: False omits the sign (Online Subspace Descent applies it after the back-projection).
        capturable: `lr` is never read back (CUDA graphs).
        moments_dtype: precision of the momentum, None for the default (`moments_dtype`).
    """

    SCRATCH: ClassVar[int] = 3
    transports: ClassVar[tuple[str, ...]] = MOMENT_TRANSPORTS

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    decay_first: bool = True
    signed: bool = True
    capturable: bool = False
    moments_dtype: torch.dtype | None = None

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """A zero momentum."""
        dtype = moments_dtype(self.moments_dtype, like.dtype)
        return {"exp_avg": torch.zeros(tuple(shape), dtype=dtype, device=like.device)}

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """One moment."""
        return numel(shape) * moments_itemsize(self.moments_dtype, itemsize)

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        lr: Any = self.lr if self.capturable else scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        alpha = lr if self.decay_first else lr * decay_factor
        updates = []
        for grad, state in zip(grads, states, strict=True):
            stored: Tensor = state["exp_avg"]
            moment = stored
            if stored.dtype != grad.dtype:
                wide = wide_dtype(grad)
                moment, grad = stored.to(wide), grad.to(wide)
            direction = moment.lerp(grad, 1 - self.betas[0])
            if self.signed:
                direction.sign_()
            moment.lerp_(grad, 1 - self.betas[1])
            if moment is not stored:
                stored.copy_(moment)
            updates.append(Update(direction, alpha, decay_factor))
        return updates

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """See `UpdateRule.scratch_bytes`: directions, and what of the moments is converted."""
        own, wide = dtype.itemsize, wide_dtype(dtype)
        stored: Tensor = state["exp_avg"]
        if stored.dtype == dtype:
            return own * (1 if overwrites else 2)
        if wide != dtype:
            converted = 0 if stored.dtype == wide else wide.itemsize
            return own * (1 if overwrites else 2) + (wide.itemsize + converted) // 2
        narrowed = 0 if overwrites else own
        return own + wide.itemsize + max(narrowed, 0 if stored.dtype == wide else wide.itemsize)

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
        lr: Any = self.lr if self.capturable else scalar(self.lr)
        stored: list[Tensor] = [state["exp_avg"] for state in states]
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        alpha = lr if self.decay_first else lr * decay_factor
        if stored[0].dtype != grads_b.dtype != wide_dtype(grads_b):
            direction_b = self._advance_in_pieces(grads_b, stored, good_b, overwrites=overwrites)
            return Update(direction_b, alpha, decay_factor)
        wide = grads_b.dtype if stored[0].dtype == grads_b.dtype else wide_dtype(grads_b)
        direction_b = (
            grads_b if overwrites and grads_b.dtype == wide else grads_b.to(wide, copy=True)
        )
        self._advance(direction_b, stored)
        if good_b is not None:
            direction_b.mul_(good_b.view(-1, 1, 1))
        return Update(direction_b, alpha, decay_factor)

    def _advance(self, direction_b: Tensor, stored: list[Tensor]) -> None:
        """In place: gradients in the width of the arithmetic become directions; momentum."""
        beta1, beta2 = self.betas
        wide, directions = direction_b.dtype, list(direction_b.unbind(0))
        moments = stored if stored[0].dtype == wide else [moment.to(wide) for moment in stored]
        # With D = b1 M + (1 - b1) G there is G - M = (D - M) / (1 - b1), which needs no other copy.
        torch._foreach_lerp_(directions, moments, beta1)
        torch._foreach_lerp_(moments, directions, (1 - beta2) / (1 - beta1))
        if moments is not stored:
            torch._foreach_copy_(stored, moments)
        if self.signed:
            direction_b.sign_()

    def _advance_in_pieces(
        self,
        grads_b: Tensor,
        stored: Sequence[Tensor],
        good_b: Tensor | None,
        *,
        overwrites: bool,
    ) -> Tensor:
        """Advances wider moments; directions in the gradients' type, as products take them.

        In two pieces of rows: what is as wide as the moments has half of the entries.
        """
        wide = wide_dtype(grads_b)
        direction_b = grads_b if overwrites else torch.empty_like(grads_b)
        half = -(-grads_b.shape[1] // 2)
        for rows in (slice(0, half), slice(half, None)):
            ahead_b = grads_b[:, rows].to(wide)
            self._advance(ahead_b, [moment[rows] for moment in stored])
            if good_b is None:
                direction_b[:, rows].copy_(ahead_b)
            else:
                torch.mul(ahead_b, good_b.view(-1, 1, 1), out=direction_b[:, rows])
            del ahead_b  # before the next piece's
        return direction_b

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule`; with one moment "restore" and "rotate" are the same."""
        moment: Tensor = state["exp_avg"]
        moved = torch.zeros_like(moment) if how == "reset" else rotation(moment)
        (into or state)["exp_avg"].copy_(moved)
