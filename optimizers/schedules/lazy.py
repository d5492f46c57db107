"""Lazy layer-wise refreshes: a layer whose subspace is stable is refitted less often.

Q-GaLore (arXiv 2407.08296, section 3.3): each matrix has its own gap, at first `update_proj_gap`.
At a refresh the leading vectors of the old and the new basis are compared,

    c = <v_old, v_new> / (|v_old| |v_new|)

and c is appended to a queue of `queue_size` values. When it is full and its mean is at least
`cos_threshold`, the gap is multiplied by `gamma_proj`. As in the official code, c keeps its sign
(with `refresh="svd"`, where signs are arbitrary, a flip counts as -1; the other modes align signs),
the queue is not cleared when the gap grows, and the gap neither shrinks nor is bounded.

Memory: one fp32 vector of d entries and `queue_size` fp32 numbers a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.geometry import Geometry
from .base import NEVER, Schedule, passed


@dataclass(frozen=True)
class LazyLayerwise(Schedule):
    """Refreshes at multiples of each matrix's own, growing gap.

    A refresh that failed is tried again at each following step until it succeeds.

    Attributes:
        cos_threshold: smallest mean similarity at which the gap grows, in [-1, 1].
        gamma_proj: what the gap is multiplied by, at least 1.
        queue_size: similarities that are averaged.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("cos_threshold", "gamma_proj", "queue_size")

    COLUMNS_READ: ClassVar[int] = 1

    cos_threshold: float = 0.4
    gamma_proj: float = 2.0
    queue_size: int = 5

    def __post_init__(self) -> None:
        checks.number("cos_threshold", self.cos_threshold, low=-1.0, high=1.0)
        checks.number("gamma_proj", self.gamma_proj, low=1.0)
        checks.integer("queue_size", self.queue_size, low=1)

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """The initial gap, an empty queue and a zero vector."""
        return super().init(geometry, like) | {
            "gap": self.gap,
            "similarities": torch.zeros(self.queue_size, dtype=torch.float32, device=like.device),
            "similarity_count": 0,
            "leading": torch.zeros(_length(geometry), dtype=torch.float32, device=like.device),
        }

    def state_bytes(self, geometry: Geometry) -> int:
        """Queue and vector."""
        return 4 * (self.queue_size + _length(geometry))

    def carry(self, previous: Schedule, old: Mapping[str, Any], new: dict[str, Any]) -> None:
        """See `Schedule.carry`: each matrix's gap is scaled by the ratio of the options."""
        super().carry(previous, old, new)
        if isinstance(previous, LazyLayerwise):
            new["leading"] = old["leading"]
            new["gap"] = max(1, round(old["gap"] * self.gap / previous.gap))
            if self.queue_size == previous.queue_size:
                for key in ("similarities", "similarity_count"):
                    new[key] = old[key]

    def due(self, state: Mapping[str, Any], steps_done: int, index: int, count: int) -> bool:
        """At every multiple of the matrix's own gap, shifted for each matrix when staggered."""
        phase = (index * self.gap // count) if self.stagger else 0
        return passed(int(state["gap"]), int(state["refreshed_at"]), steps_done, phase)

    def record(
        self, state: MutableMapping[str, Any], steps_done: int, bases: Sequence[Tensor]
    ) -> Tensor | None:
        """Compares the leading vectors; their mean similarity, once the queue is full."""
        mean: Tensor | None = None
        leading = bases[0][:, 0].to(torch.float32)
        if state["refreshed_at"] != NEVER:
            previous, queue = state["leading"], state["similarities"]
            cosine = torch.nn.functional.cosine_similarity(previous, leading, dim=0)
            queue.copy_(torch.cat((queue[1:], cosine.view(1))))
            state["similarity_count"] = min(state["similarity_count"] + 1, self.queue_size)
            if state["similarity_count"] == self.queue_size:
                mean = queue.mean()
        state["leading"].copy_(leading)
        super().record(state, steps_done, bases)
        return mean

    def decide(self, state: MutableMapping[str, Any], number: float) -> None:
        """Lengthens the gap if the mean similarity is high."""
        if number >= self.cos_threshold:
            state["gap"] = int(state["gap"] * self.gamma_proj)


def _length(geometry: Geometry) -> int:
    """Entries of a column of the first basis."""
    return next(iter(geometry.basis_shapes.values()))[0]
