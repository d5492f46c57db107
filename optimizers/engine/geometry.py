"""Which axis of a matrix is projected, and which of its rows this process holds.

Legend of shape suffixes used in this package: a weight or gradient is m x n (`grad_mn`), its
projection has rank r (`projected_rn` when the left axis is projected, `projected_mr` when the right
one is). The projection matrix P is called the basis (`basis_mr` or `basis_nr`); its columns are
orthonormal unless a projector says otherwise. The short side is d = min(m, n), the long side
l = max(m, n).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

from torch import Tensor

from .processes import ALONE, Processes

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


class Side(IntEnum):
    """The projected axis: LEFT means P^T G, RIGHT means G P, BOTH means P^T G Q."""

    LEFT = 0
    RIGHT = 1
    BOTH = 2


def side_of(shape: tuple[int, int], proj_type: str) -> Side:
    """Returns the side that `proj_type` means for a matrix of the original global `shape`.

    `std` projects the shorter axis, a square matrix on the right (GaLore, official code).
    """
    rows, columns = shape
    if proj_type == "full":
        return Side.BOTH
    if proj_type in ("left", "right"):
        return Side.LEFT if proj_type == "left" else Side.RIGHT
    shorter = Side.RIGHT if rows >= columns else Side.LEFT
    if proj_type == "std":
        return shorter
    return Side.LEFT if shorter is Side.RIGHT else Side.RIGHT


@dataclass(frozen=True)
class Geometry:
    """Shapes of one projected matrix, from its original global shape.

    Attributes:
        shape: (m, n), the whole matrix, also when this process holds only some of its rows.
        side: the projected axis.
        rank: r, at most min(m, n).
        mirrored: it is that of the transposed parameter, whose columns are spread over processes.
    """

    shape: tuple[int, int]
    side: Side
    rank: int
    mirrored: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, shape: tuple[int, int], rank: int, proj_type: str) -> Geometry:
        """The geometry of an m x n matrix; a rank above min(m, n) is clamped to it."""
        return cls(shape, side_of(shape, proj_type), min(rank, *shape))

    def mirror(self) -> Geometry:
        """The geometry of the transposed parameter: keys and values of its bases are the same."""
        sides = {Side.LEFT: Side.RIGHT, Side.RIGHT: Side.LEFT, Side.BOTH: Side.BOTH}
        m, n = self.shape
        return replace(self, shape=(n, m), side=sides[self.side], mirrored=not self.mirrored)

    @property
    def original_shape(self) -> tuple[int, int]:
        """The shape of the parameter, whichever way it is seen."""
        m, n = self.shape
        return (n, m) if self.mirrored else (m, n)

    @property
    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """State key and shape of each basis, the left one first: m x r, n x r."""
        m, n = self.shape
        if self.side is Side.BOTH:
            left, right = ("basis_right", "basis") if self.mirrored else ("basis", "basis_right")
            return {left: (m, self.rank), right: (n, self.rank)}
        return {"basis": ((m if self.side is Side.LEFT else n), self.rank)}

    def projected_shape(self, local_rows: int | None = None) -> tuple[int, int]:
        """Shape of the projected gradient (for `local_rows` of the m rows when given)."""
        m, n = self.shape
        if self.side is Side.LEFT:
            return self.rank, n
        if self.side is Side.RIGHT:
            return (m if local_rows is None else local_rows), self.rank
        return self.rank, self.rank


@dataclass(frozen=True)
class RowRange:
    """The rows [start, stop) of an m x n matrix that this process holds.

    Attributes:
        start: first row held.
        stop: one past the last row held.
        processes: those that hold the other rows.
        sizes: rows of each of them, in their order; those of `chunk_range` if empty.
        total: m, where others hold rows.
    """

    start: int
    stop: int
    processes: Processes = field(default=ALONE)
    sizes: tuple[int, ...] = ()
    total: int = field(default=0, kw_only=True)

    @classmethod
    def held(cls, rows: int, processes: Processes) -> RowRange:
        """This process's rows of a matrix that `chunk_range` divides."""
        own = processes.columns(rows)
        return cls(own.start, own.stop, processes, total=rows)

    @classmethod
    def whole(cls, rows: int) -> RowRange:
        """All rows of a matrix, on one process."""
        return cls(0, rows, total=rows)

    def part(self, span: slice) -> RowRange:
        """The rows of `span`, which counts from `start` and has explicit ends."""
        return replace(self, start=self.start + span.start, stop=self.start + span.stop)

    def alone(self) -> RowRange:
        """The same rows where sums over the processes are taken later."""
        return replace(self, processes=ALONE, sizes=())

    def assemble(self, local_kr: Tensor) -> Tensor:
        """The whole tensor of m rows from those of all processes; itself if all are here."""
        return self.processes.gather_rows(local_kr, self.total, self.sizes)
