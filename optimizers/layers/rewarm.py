"""Re-warm-up of the learning rate after each event of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..engine.rotation import Rotation
from ..rules import Adam, Update, UpdateRule
from ..rules.base import State
from ..rules.updates import picked


@dataclass(frozen=True)
class Rewarmed(UpdateRule):
    """Adam with a learning rate of lr min(1, s / (w + 1)) in the s-th step after an event.

    Until the first event it is lr. Nothing is stored: s is `step - refreshed_at`.

    Attributes:
        inner: the rule, with learning rate lr.
        steps: w.
    """

    inner: Adam
    steps: int

    def at_rate(self, lr: float | Tensor | None) -> Rewarmed:
        """See `UpdateRule.at_rate`."""
        return replace(self, inner=self.inner.at_rate(lr))

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """See `UpdateRule.init`."""
        return self.inner.init(shape, like)

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """See `UpdateRule.state_bytes`."""
        return self.inner.state_bytes(shape, itemsize)

    def share(self, state: State) -> float:
        """This step's learning rate as a share of lr; `step` already counts this step."""
        event = int(state["refreshed_at"])
        return min(1.0, (int(state["step"]) - event) / (self.steps + 1)) if event > 0 else 1.0

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        updates: dict[int, Update] = {}
        for rule, positions in self._by_rate(states):
            own_grads, own_states, own_weights, _ = picked(positions, grads, states, weights, None)
            made = rule.update(own_grads, own_states, own_weights)
            updates.update(zip(positions, made, strict=True))
        return [updates[i] for i in range(len(grads))]

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """See `UpdateRule.apply`."""
        for rule, positions in self._by_rate(states):
            rule.apply(*picked(positions, grads, states, weights, good_b))

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule.transport_moments`."""
        self.inner.transport_moments(state, how, rotation, into)

    def carry(self, previous: UpdateRule, old: State, new: State) -> bool:
        """See `UpdateRule.carry`."""
        before = previous.inner if isinstance(previous, Rewarmed) else previous
        return self.inner.carry(before, old, new)

    def _by_rate(self, states: Sequence[State]) -> list[tuple[Adam, list[int]]]:
        """Rules with their learning rates, and the positions that each is for."""
        shares: dict[float, list[int]] = defaultdict(list)
        for i, state in enumerate(states):
            shares[self.share(state)].append(i)
        return [
            (self.inner if share == 1.0 else replace(self.inner, lr=self.inner.lr * share), held)
            for share, held in shares.items()
        ]
