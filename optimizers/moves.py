"""Carrying moments from a subspace to the one that replaces it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .composition import Projection
from .projectors import Side, Slot
from .rules import Rotation, UpdateRule


def move_moments(
    slot: Slot, former: Sequence[Tensor], projection: Projection, rule: UpdateRule
) -> None:
    """In place: adapts a matrix's moments to its new bases, as its option `moments` says.

    Args:
        slot: the matrix, its new bases stored.
        former: the bases before.
        projection: the group's projection.
        rule: whose moments these are.
    """
    between = [
        new.mT @ old.to(new.dtype)
        for new, old in zip(projection.projector.bases(slot), former, strict=True)
    ]
    side = slot.geometry.side
    rotation = Rotation(
        left=None if side is Side.RIGHT else between[0],
        right=None if side is Side.LEFT else between[-1],
    )
    rule.move(slot.state, projection.options.moments, rotation)
