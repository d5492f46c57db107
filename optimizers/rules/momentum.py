"""Stochastic gradient descent, with or without momentum, in torch's form.

    M <- momentum M + G,  U = G + momentum M with Nesterov, else M
    W <- (1 - lr wd) W - lr U

The momentum starts at zero, as in `torch.optim.SGD`. Memory: 1 entry of `moments_dtype`,
none without momentum.
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
class Momentum(ElementwiseRule):
    """SGD's hyper-parameters.

    Attributes:
        lr: learning rate, a float or a 0-d tensor.
        momentum: decay of the first moment, 0 for plain SGD.
        nesterov: look ahead by one momentum step.
        weight_decay: decoupled, times lr, before the update.
        capturable: `lr` is never read back (CUDA graphs).
        moments_dtype: precision of the momentum, None for the default (`moments_dtype`).
    """

    transports: ClassVar[tuple[str, ...]] = MOMENT_TRANSPORTS

    lr: float | Tensor
    momentum: float = 0.9
    nesterov: bool = False
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

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        lr: Any = self.lr if self.capturable else scalar(self.lr)
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        updates = []
        for grad, state in zip(grads, states, strict=True):
            if not self.momentum:
                # a copy, since the caller may scale it in place
                updates.append(Update(grad.clone(), lr, decay_factor))
                continue
            stored: Tensor = state["momentum_buffer"]
            wide = grad.dtype if stored.dtype == grad.dtype else wide_dtype(grad)
            moment = stored.to(wide)
            direction = grad.to(wide, copy=True)
            moment.mul_(self.momentum).add_(direction)
            if self.nesterov:
                direction.add_(moment, alpha=self.momentum)
            else:
                direction.copy_(moment)
            if moment is not stored:
                stored.copy_(moment)
            updates.append(Update(direction, lr, decay_factor))
        return updates

    def first_moment(self, state: State) -> Tensor | None:
        """The momentum."""
        moment: Tensor | None = state.get("momentum_buffer")
        return moment

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule`; with one moment "restore" and "rotate" are the same."""
        if self.momentum:
            moment: Tensor = state["momentum_buffer"]
            moved = torch.zeros_like(moment) if how == "reset" else rotation(moment)
            (into or state)["momentum_buffer"].copy_(moved)
