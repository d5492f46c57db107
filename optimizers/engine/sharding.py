"""Which part of a parameter lies on this process.

FSDP2 (`torch.distributed.fsdp.fully_shard`) makes parameters DTensors. Accepted placements are one
`Shard(0)`, or `Shard(1)` of a matrix, and `Replicate` over any other dimensions of the mesh (HSDP).
A step sees plain local tensors: rows of the weight and its gradient, of a matrix with spread
columns those of its transpose; and a `LocalState` that knows which `Part` of the (projected)
gradient its moments belong to. In `optimizer.state` moments are DTensors over the parameter's mesh,
bases and step counts plain tensors, equal on all processes.

Moments of a right projection are spread as the rows are. A left projection, r x n, has the same
rows everywhere; its moments are spread by columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .geometry import Geometry, RowRange, Side
from .processes import ALONE, Processes
from .row_block import RowBlock

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ACCEPTED = (
    "accepted is one Shard(0), or Shard(1) of a matrix, and Replicate over other mesh dimensions "
    "(fully_shard, also HSDP)"
)


@dataclass(frozen=True)
class Part:
    """The part of a (projected) gradient that this process's moments belong to.

    Attributes:
        shape: of the whole (projected) gradient.
        axis: the axis that is spread over the processes; None where all of it is here.
        start: first index held.
        stop: one past the last index held.
        processes: those that the parameter is spread over.
        sizes: indices that each of them holds, see `RowRange`.
        weight_entries: number of entries of the whole parameter.
        transposed: it is that of the transposed parameter.
    """

    shape: tuple[int, ...]
    axis: int | None
    start: int
    stop: int
    processes: Processes
    sizes: tuple[int, ...]
    weight_entries: int
    transposed: bool = False

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        """All of a gradient, on this process."""
        return cls(tuple(shape), None, 0, 0, ALONE, (), torch.Size(shape).numel())

    def mirror(self) -> Part:
        """The same part of the transposed gradient."""
        axis = self.axis if self.axis is None else 1 - self.axis
        return replace(self, shape=self.shape[::-1], axis=axis, transposed=not self.transposed)

    @property
    def original_shape(self) -> tuple[int, ...]:
        """The whole shape, as the parameter lies."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this part."""
        held = self.stop - self.start
        return tuple(held if i == self.axis else size for i, size in enumerate(self.shape))

    @property
    def spread(self) -> Processes:
        """The processes that hold the rest of the (projected) gradient."""
        return ALONE if self.axis is None else self.processes

    def gather(self, tensor: Tensor) -> Tensor:
        """The whole tensor from the processes' parts, of which this one is given."""
        if self.axis is None:
            return tensor
        count = self.shape[self.axis]
        if self.axis == 1:
            return self.spread.gather_columns(tensor, count)
        return self.spread.gather_rows(tensor, count, self.sizes)

    def sum_along(self, axis: int, tensor: Tensor) -> Tensor:
        """Completes sums that this process took of its part along an axis."""
        return self.processes.sum(tensor) if axis == self.axis else tensor


#: Entries that belong to rows and columns, and change places in the transpose.
_FACTORS = {
    "exp_avg_sq_row": "exp_avg_sq_col",
    "exp_avg_sq_col": "exp_avg_sq_row",
    "exp_avg_left": "exp_avg_right",
    "exp_avg_right": "exp_avg_left",
    "exp_avg_sq_left": "exp_avg_sq_right",
    "exp_avg_sq_right": "exp_avg_sq_left",
}


def _seen(key: str, value: Any) -> Any:
    """An entry of the state of a parameter that is seen as its transpose: moments, not bases."""
    matrix = isinstance(value, Tensor) and value.dim() == 2 and not key.startswith("basis")
    return value.mT if matrix else value


class LocalState(dict[str, Any]):
    """A parameter's state during a step: local tensors, and integers that are written through."""

    def __init__(self, origin: dict[str, Any], part: Part) -> None:
        """Unwraps the DTensors of a state in `optimizer.state`."""
        local = {key: local_part(value) for key, value in origin.items()}
        if part.transposed:
            local = {_FACTORS.get(key, key): _seen(key, value) for key, value in local.items()}
        super().__init__(local)
        self._origin, self.part = origin, part

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets an integer here and in the optimizer's state; tensors are written in place."""
        super().__setitem__(key, value)
        self._origin[key] = value


def part_of(state: dict[str, Any]) -> Part | None:
    """The part of the (projected) gradient that a state's moments belong to; None for all of it."""
    return getattr(state, "part", None)


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without importing them."""
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


def local_part(value: Any) -> Any:
    """The local tensor of a DTensor or row block; anything else itself."""
    return value.to_local() if hasattr(value, "to_local") else value


@dataclass(frozen=True)
class Shard:
    """The part of a parameter on this process.

    Attributes:
        shape: of the whole parameter, or its transpose.
        rows: the rows held; of a scalar the only entry.
        mesh: of the DTensor; None for a plain tensor.
        mesh_dim: the mesh dimension that rows are spread over, if any.
        transposed: the parameter's columns are spread, so that it is seen as its transpose.
    """

    shape: tuple[int, ...]
    rows: RowRange
    mesh: DeviceMesh | None = None
    mesh_dim: int | None = None
    transposed: bool = False

    def local(self, tensor: Tensor) -> Tensor:
        """This process's part of the parameter, or its gradient, as rows."""
        return self.as_rows(local_part(tensor))

    def as_rows(self, local: Tensor) -> Tensor:
        """A local part as it is seen: spread columns as rows."""
        return local.mT if self.transposed else local

    def seen(self, geometry: Geometry) -> Geometry:
        """The geometry of what a step sees, from the parameter's."""
        return geometry.mirror() if self.transposed else geometry

    @property
    def plain(self) -> bool:
        """Whether the parameter is a plain tensor, all of it here."""
        return self.mesh is None and self.rows.processes.alone

    @property
    def entries(self) -> int:
        """Number of entries of the whole parameter."""
        return torch.Size(self.shape).numel()

    def local_state(self, state: dict[str, Any], geometry: Geometry | None) -> dict[str, Any]:
        """A parameter's state as a step sees it; of a plain tensor the state itself."""
        return state if self.plain or not state else LocalState(state, self.part(geometry))

    def part(self, geometry: Geometry | None) -> Part:
        """The part of the (projected) gradient whose moments are here."""
        rows, entries = self.rows, self.entries
        shape = self.shape if geometry is None else geometry.projected_shape()
        if not shape or (geometry is not None and geometry.side is Side.BOTH):
            return Part(shape, None, 0, 0, rows.processes, (), entries, self.transposed)
        if geometry is not None and geometry.side is Side.LEFT:
            held = rows.processes.columns(shape[1])
            span = held.start, held.stop
            return Part(shape, 1, *span, rows.processes, (), entries, self.transposed)
        span = rows.start, rows.stop
        return Part(shape, 0, *span, rows.processes, rows.sizes, entries, self.transposed)

    def distribute(self, local: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
        """A tensor of a given shape that is spread along `dim` as the parameter is by rows.

        A DTensor where the parameter is one, otherwise the local part.
        """
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor import Shard as Placement

        placements: list[Any] = [Replicate()] * self.mesh.ndim
        if self.mesh_dim is not None:
            placements[self.mesh_dim] = Placement(dim)
        whole = torch.empty(tuple(shape), device="meta")
        made: Tensor = DTensor.from_local(
            local,
            self.mesh,
            placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return made


def shard_of(param: Tensor, called: str | None = None) -> Shard:
    """Which part of a parameter lies here.

    Args:
        param: a plain tensor or a DTensor.
        called: its name in messages.

    Raises:
        ValueError: its placements aren't accepted.
    """
    shape = tuple(param.shape)
    whole = RowRange.whole(shape[0] if shape else 1)
    if isinstance(param, RowBlock):
        return Shard(shape, param.rows)
    if not is_dtensor(param):
        return Shard(shape, whole)
    mesh: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = param.placements  # type: ignore[attr-defined]
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    # By the exact type: a _StridedShard is a Shard too.
    dims = [placements[i].dim if type(placements[i]).__name__ == "Shard" else None for i in split]
    known = all(spread == 0 or (spread == 1 and len(shape) == 2) for spread in dims)
    if not known or len(split) > 1:
        named = ", ".join(map(str, placements))
        name = called or f"the parameter of shape {shape}"
        raise ValueError(f"{name} is a DTensor with placements ({named}): {_ACCEPTED}")
    if not split:
        return Shard(shape, whole, mesh)
    (dim,) = split
    processes = Processes.of(mesh.get_group(dim))
    transposed = dims == [1]
    shape = shape[::-1] if transposed else shape
    return Shard(shape, RowRange.held(shape[0], processes), mesh, dim, transposed)
