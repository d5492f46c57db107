"""A rule for parameters that aren't trained at present: empty state, no update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .base import State, Update, UpdateRule


@dataclass(frozen=True)
class Resting(UpdateRule):
    """Leaves weights as they are; nor does it decay them.

    State: the entries of the other rule's, so that files have the same ones in every period, but
    tensors have no elements.

    Attributes:
        rule: what updates the parameter at other times.
    """

    rule: UpdateRule

    def at_rate(self, lr: float | Tensor | None) -> Self:
        """See `UpdateRule.at_rate`."""
        return replace(self, rule=self.rule.at_rate(lr))

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Tensors without elements."""
        return {
            key: torch.empty(0, dtype=value.dtype, device=like.device)
            if isinstance(value, Tensor)
            else value
            for key, value in self.rule.init(shape, like.to("meta")).items()
        }

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Nothing."""
        return 0

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """Each process has the whole of nothing."""
        return None

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """Updates of zero."""
        return [Update(torch.zeros_like(grad), 0.0, 1.0) for grad in grads]

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """Leaves weights as they are."""
