"""Carrying moments from a subspace to the one that replaces it."""

from __future__ import annotations

from ..projectors import Bases, Slot
from ..rules import UpdateRule
from .composition import Projection


def move_moments(slot: Slot, former: Bases, projection: Projection, rule: UpdateRule) -> None:
    """In place: adapts a matrix's moments to its new bases, as its option `moments` says.

    Args:
        slot: the matrix, its new bases stored.
        former: the bases before.
        projection: the group's projection.
        rule: whose moments these are.
    """
    rotation = projection.projector.rotation(slot, former)
    rule.move(slot.state, projection.options.moments, rotation)
