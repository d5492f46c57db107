"""Change of coordinates from one subspace to another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Change of coordinates from one subspace to another: R -> left R right^T.

    Attributes:
        left: P_new^T P_old of a left projection, new r x old r; None if the left axis is not
            projected.
        right: the same for a right projection.
    """

    left: Tensor | None
    right: Tensor | None

    def __call__(self, projected: Tensor) -> Tensor:
        """The projected tensor in the new coordinates, in its own precision."""
        moved = projected
        if self.left is not None:
            moved = self.left.to(projected.dtype) @ moved
        if self.right is not None:
            moved = moved @ self.right.to(projected.dtype).mT
        return moved

    def squared(self) -> Rotation:
        """The rotation with squared entries, for variances of independent coordinates."""
        return Rotation(*(None if m is None else m.square() for m in (self.left, self.right)))
