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

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`sum` of each of some tensors of one dtype and device, in one reduction."""
        if self.group is None or len(tensors) < 2:
            return [self.sum(tensor) for tensor in tensors]
        total = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        distributed.all_reduce(total, group=self.group)
        parts = torch.split(total, [tensor.numel() for tensor in tensors])
        return [own.view(tensor.shape) for own, tensor in zip(parts, tensors, strict=True)]

    def all_agree(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag whether it is set on every process."""
        if self.group is None:
            return list(flags)
        return [bool(flag) for flag in self.smallest([int(flag) for flag in flags], device)]

    def smallest(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """The smallest of each of some numbers (int32) over the processes."""
        if self.group is None:
            return list(numbers)
        table = torch.tensor(numbers, dtype=torch.int32, device=device)
        distributed.all_reduce(table, op=distributed.ReduceOp.MIN, group=self.group)
        smallest: list[int] = table.tolist()
        return smallest

    def columns(self, count: int) -> range:
        """Which of `count` columns this process updates for all of them."""
        return chunk_range(count, self.world, self.rank)

    def scatter_columns(self, partial_rn: Tensor) -> Tensor:
        """This process's `columns` of the sum of r x n tensors: half the bytes of an all-reduce."""
        return self.scatter_all_columns([partial_rn])[0]

    def scatter_all_columns(self, partials: Sequence[Tensor]) -> list[Tensor]:
        """`scatter_columns` of each of some r x n tensors of one dtype, in one collective."""
        if self.group is None or not partials:
            return list(partials)
        widths = [-(-partial.shape[1] // self.world) for partial in partials]
        sizes = [w * len(partial) for w, partial in zip(widths, partials, strict=True)]
        padded = partials[0].new_zeros(self.world, sum(sizes))
        pieces = torch.split(padded, sizes, dim=1)
        for piece, width, partial_rn in zip(pieces, widths, partials, strict=True):
            for own, columns in zip(piece, torch.split(partial_rn, width, dim=1), strict=False):
                own.view(width, -1)[: columns.shape[1]] = columns.mT
        sums = padded.new_empty(sum(sizes))
        scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
        scatter(sums, padded.view(-1), group=self.group)
        held = [len(self.columns(partial.shape[1])) for partial in partials]
        return [
            piece.view(width, -1)[:count].mT.contiguous()
            for piece, width, count in zip(torch.split(sums, sizes), widths, held, strict=True)
        ]

    def gather_columns(self, part_rc: Tensor, count: int) -> Tensor:
        """The r x `count` tensor of which each process has its `columns`."""
        return self.gather_all_columns([part_rc], [count])[0]

    def gather_all_columns(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """`gather_columns` of each of some tensors of one dtype, in one collective."""
        if self.group is None or not parts:
            return list(parts)
        widths = [-(-count // self.world) for count in counts]
        sizes = [width * len(part_rc) for width, part_rc in zip(widths, parts, strict=True)]
        own = parts[0].new_zeros(sum(sizes))
        for piece, part_rc in zip(torch.split(own, sizes), parts, strict=True):
            piece.view(-1, len(part_rc))[: part_rc.shape[1]] = part_rc.mT
        gathered = own.new_empty(self.world * len(own))
        _newest("all_gather_single", "all_gather_into_tensor")(gathered, own, group=self.group)
        pieces = torch.split(gathered.view(self.world, -1), sizes, dim=1)
        return [
            piece.reshape(-1, len(part_rc))[:count].mT
            for piece, part_rc, count in zip(pieces, parts, counts, strict=True)
        ]

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
