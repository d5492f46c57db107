"""Parameters of which a flat partition holds a piece, as blocks of whole rows.

ZeRO cuts a flattened parameter of m x n anywhere: a process holds entries [start, stop). It owns
the rows whose first entry is among them, and the entries before its first whole row belong to a row
of another process. Before a step these few entries of gradient and weight are sent to the row's
owner, after it the owner returns the weight's: at most two cut rows a piece, whatever m is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from .geometry import RowRange
from .processes import Processes

_KNOWN = (
    torch.ops.aten.detach.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.zeros_like.default,
)


class RowBlock(Tensor):
    """A parameter of which this process holds some rows: global shape, local values.

    Attributes:
        rows: the rows held.
        local: their values, k x ...; replaced at each step.
    """

    rows: RowRange
    local: Tensor

    @staticmethod
    def __new__(cls, shape: Sequence[int], local: Tensor, rows: RowRange) -> RowBlock:
        """A block of a parameter of `shape`."""
        made: RowBlock = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device
        )
        made.rows, made.local = rows, local
        return made

    def to_local(self) -> Tensor:
        """The rows held."""
        return self.local

    def __repr__(self) -> str:  # type: ignore[override]
        """Its shape and rows; values would need the other processes."""
        return f"RowBlock({tuple(self.shape)}, rows {self.rows.start} to {self.rows.stop})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Detaches, casts, moves, makes zeros; anything else needs the other processes' rows."""
        block = args[0]
        if func not in _KNOWN or not isinstance(block, RowBlock):
            raise NotImplementedError(f"{func} of a row block: accepted is its local tensor")
        local = func(block.local, *args[1:], **(kwargs or {}))
        return RowBlock(block.shape, local, block.rows)


@dataclass(frozen=True)
class Transfer:
    """Entries [start, stop) of a flattened parameter that lie with `holder` in a row of `owner`."""

    holder: int
    owner: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """How the entries of a flattened parameter are cut.

    Attributes:
        shape: of the parameter.
        pieces: (start, stop) of each process.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Entries of a row."""
        return torch.Size(self.shape[1:]).numel()

    def owned(self, rank: int) -> range:
        """The rows whose first entry a process holds."""
        start, stop = (-(-end // self.width) for end in self.pieces[rank])
        return range(start, stop)

    def rows(self, processes: Processes) -> RowRange:
        """The rows of this process, with those of the others."""
        own = self.owned(processes.rank)
        sizes = tuple(len(self.owned(rank)) for rank in range(processes.world))
        return RowRange(own.start, own.stop, processes, sizes, total=self.shape[0])

    def transfers(self) -> Iterator[Transfer]:
        """What is sent between processes, in the same order on all of them."""
        for holder, (start, stop) in enumerate(self.pieces):
            if start == stop or start % self.width == 0:
                continue
            row = start // self.width
            (owner,) = (r for r in range(len(self.pieces)) if row in self.owned(r))
            yield Transfer(holder, owner, start, min(stop, (row + 1) * self.width))


@dataclass
class Fragment:
    """A parameter's piece in a flat partition, and the block of rows that is made of it.

    Attributes:
        layout: of all processes' pieces.
        block: the rows that this process owns.
        weight: this process's entries, 1-d, a view of the partition.
        gradient: the same of the gradient, or None.
    """

    layout: Layout
    block: RowBlock
    weight: Tensor
    gradient: Tensor | None = None

    @property
    def held(self) -> list[Tensor]:
        """This process's entries, of the gradient too if there is one."""
        return [self.weight] if self.gradient is None else [self.weight, self.gradient]


def take_rows(fragments: Sequence[Fragment], processes: Processes) -> None:
    """In place: gives each fragment's block its rows of weight and, if there is one, gradient.

    All processes call it with the same parameters in the same order.

    Args:
        fragments: which have a gradient on all processes or on none.
        processes: the holders of the pieces.
    """
    sent: list[tuple[int, Tensor]] = []
    received: list[tuple[int, Tensor]] = []
    wanted: list[tuple[Fragment, Tensor]] = []
    for fragment in fragments:
        for transfer in fragment.layout.transfers():
            entries = transfer.stop - transfer.start
            if transfer.holder == processes.rank:
                first = transfer.start - fragment.layout.pieces[processes.rank][0]
                own = slice(first, first + entries)
                entries_here = torch.stack([tensor[own] for tensor in fragment.held])
                sent.append((transfer.owner, entries_here))
            elif transfer.owner == processes.rank:
                others = fragment.weight.new_empty(len(fragment.held), entries)
                received.append((transfer.holder, others))
                wanted.append((fragment, others))
    _exchange(sent, received, processes)
    tails: dict[int, list[Tensor]] = {}
    for fragment, others in wanted:
        tails.setdefault(id(fragment), []).append(others)
    for fragment in fragments:
        block, ends = fragment.block, tails.get(id(fragment), ())
        weight, *gradients = (
            _rows(fragment, own, [end[index] for end in ends], processes.rank)
            for index, own in enumerate(fragment.held)
        )
        block.local = weight
        for gradient in gradients:
            block.grad = RowBlock(block.shape, gradient, block.rows)


def _rows(fragment: Fragment, own: Tensor, tails: Sequence[Tensor], rank: int) -> Tensor:
    """The rows that a process owns: a view of its entries, or a copy if a row is completed."""
    layout = fragment.layout
    rows, (start, stop) = layout.owned(rank), layout.pieces[rank]
    first = min(rows.start * layout.width, stop) - start
    whole = own[first:] if rows else own[:0]
    if tails:
        whole = torch.cat([whole, *tails])
    return whole.view(len(rows), *layout.shape[1:])


def return_rows(fragments: Sequence[Fragment], processes: Processes) -> None:
    """In place: writes blocks that are copies, and rows of other processes, to the partitions."""
    sent: list[tuple[int, Tensor]] = []
    received: list[tuple[int, Tensor]] = []
    wanted: list[tuple[Tensor, Tensor]] = []
    for fragment in fragments:
        layout, rank = fragment.layout, processes.rank
        own, flat = layout.owned(rank), fragment.block.local.reshape(-1)
        start, stop = layout.pieces[rank]
        for transfer in layout.transfers():
            entries = transfer.stop - transfer.start
            if transfer.owner == rank:
                first = transfer.start - own.start * layout.width
                sent.append((transfer.holder, flat[first : first + entries].contiguous()))
            elif transfer.holder == rank:
                target = fragment.weight[transfer.start - start :][:entries]
                received.append((transfer.owner, torch.empty_like(target)))
                wanted.append((target, received[-1][1]))
        if own:
            target = fragment.weight[own.start * layout.width - start :]
            if target.data_ptr() != flat.data_ptr():
                target.copy_(flat[: stop - own.start * layout.width])
        fragment.block.grad = None
        # Whole rows again at the next step; until then nothing holds a copy.
        fragment.block.local = fragment.weight.new_empty(0)
    _exchange(sent, received, processes)
    for target, values in wanted:
        target.copy_(values)


def _exchange(
    sent: Sequence[tuple[int, Tensor]],
    received: Sequence[tuple[int, Tensor]],
    processes: Processes,
) -> None:
    """Sends and receives tensors, each between two processes, in the same order on both."""
    if processes.group is None or not (sent or received):
        return
    operations = [
        distributed.P2POp(
            how, tensor, distributed.get_global_rank(processes.group, peer), processes.group
        )
        for how, pairs in ((distributed.isend, sent), (distributed.irecv, received))
        for peer, tensor in pairs
    ]
    for request in distributed.batch_isend_irecv(operations):
        request.wait()
