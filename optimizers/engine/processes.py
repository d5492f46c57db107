"""Sums over the processes that share a matrix; the identity on one process.

Only low-rank tensors, vectors and numbers pass through here: never an m x n matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def chunk_range(count: int, world: int, rank: int) -> range:
    """Positions that `torch.chunk`, and so a DTensor, gives process `rank`; may be empty."""
    width = -(-count // world)
    return range(min(rank * width, count), min((rank + 1) * width, count))


@dataclass(frozen=True)
class Processes:
    """The processes among which the rows of a matrix are spread.

    All of them call each method, in the same order.

    Attributes:
        group: their process group; None for this process alone.
        world: their number.
        rank: this process's place among them.
    """

    group: ProcessGroup | None = None
    world: int = 1
    rank: int = 0

    @classmethod
    def of(cls, group: ProcessGroup) -> Processes:
        """The processes of a group; a group of one communicates nothing."""
        world = distributed.get_world_size(group)
        return ALONE if world == 1 else cls(group, world, distributed.get_rank(group))

    @property
    def alone(self) -> bool:
        """Whether all rows are here."""
        return self.group is None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in a new tensor; alone the tensor itself."""
        return tensor if self.group is None else self._reduced(tensor, distributed.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest entry by entry, not a number where any is not; alone the tensor itself."""
        if self.group is None:
            return tensor
        # What a reduction makes of NaN depends on the backend.
        unknown = tensor.isnan()
        both = torch.stack([tensor.masked_fill(unknown, -torch.inf), unknown.to(tensor.dtype)])
        largest, found = self._reduced(both, distributed.ReduceOp.MAX).unbind()
        return largest.masked_fill(found > 0, torch.nan)

    def _reduced(self, tensor: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, op=how, group=self.group)
        return total

    def all_agree(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag whether it is set on every process."""
        if self.group is None:
            return list(flags)
        table = torch.tensor(flags, dtype=torch.int32, device=device)
        distributed.all_reduce(table, op=distributed.ReduceOp.MIN, group=self.group)
        return [bool(flag) for flag in table.tolist()]

    def columns(self, count: int) -> range:
        """Which of `count` columns this process updates for all of them."""
        return chunk_range(count, self.world, self.rank)

    def scatter_columns(self, partial_rn: Tensor) -> Tensor:
        """This process's `columns` of the sum of r x n tensors: half the bytes of an all-reduce."""
        if self.group is None:
            return partial_rn
        r, n = partial_rn.shape
        width = -(-n // self.world)
        padded = partial_rn.new_zeros(self.world * width, r)
        padded[:n] = partial_rn.mT
        own = partial_rn.new_empty(width, r)
        _newest("reduce_scatter_single", "reduce_scatter_tensor")(own, padded, group=self.group)
        return own[: len(self.columns(n))].mT.contiguous()

    def gather_columns(self, part_rc: Tensor, count: int) -> Tensor:
        """The r x `count` tensor of which each process has its `columns`."""
        return part_rc if self.group is None else self.gather_rows(part_rc.mT, count).mT

    def gather_rows(self, part_cr: Tensor, count: int, sizes: Sequence[int] = ()) -> Tensor:
        """The whole tensor of which each process has some consecutive rows, in their order.

        Args:
            part_cr: this process's rows.
            count: number of all rows.
            sizes: rows of each process; those of `chunk_range` by default.
        """
        if self.group is None:
            return part_cr
        width, rest = max(sizes, default=-(-count // self.world)), part_cr.shape[1:]
        own = part_cr.new_zeros(width, *rest)
        own[: len(part_cr)] = part_cr
        gathered = part_cr.new_empty(self.world * width, *rest)
        _newest("all_gather_single", "all_gather_into_tensor")(gathered, own, group=self.group)
        if not sizes:
            return gathered[:count]
        parts = gathered.view(self.world, width, *rest).unbind()
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _newest(name: str, older: str) -> Callable[..., Any]:
    """A collective by the name that torch 2.13 gave it, or by the older one."""
    found: Callable[..., Any] = getattr(distributed, name, None) or getattr(distributed, older)
    return found


ALONE = Processes()
