"""Whether the processes that train one model have equal options and learning rates.

Unequal ones raise nothing by themselves: weights drift apart, or processes wait for each other for
ever once only some of them are due for a refresh. So each step with parameters that are spread over
processes (`fully_shard`, ZeRO) compares a checksum, 8 bytes in the reduction by which the processes
decide that gradients are finite, before anything is changed. Copies (DDP, ZeRO stage 0, the
replicas of HSDP) have no reduction in a step: they compare in the first step and in every 64th, and
so do sharded ones where no gradient is checked. Optimizers of a part of a module in copies compare
as often, and tell one step later (`equal_parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import distributed

from .copies import Copies, find_copies
from .described import described, first_difference, options_of, params_of, rate_of
from .equal_parts import PartComparison
from .options import Group
from .sharding import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .plan import Plan

#: Bytes that a process adds to the reduction of a step.
STAMP_BYTES = 8
#: Steps between comparisons that need a reduction of their own.
PERIOD = 64


class EqualOptions:
    """The comparisons of one optimizer."""

    def __init__(self) -> None:
        """Nothing was compared yet."""
        self._steps = 0
        self._copies: Copies | None = None
        self._parts: list[PartComparison] = []
        self._known: dict[int, tuple[Plan, int]] = {}

    def count_step(self) -> bool:
        """Called once a step; whether a comparison of its own is due in it."""
        self._steps += 1
        return self._steps % PERIOD == 1

    def number(self, plans: Sequence[Plan]) -> int:
        """A checksum of all groups' options, rates and shapes, below 2^31."""
        total = 0
        for plan in plans:
            known, fixed = self._known.get(id(plan), (None, 0))
            if known is not plan:
                fixed = crc32(
                    repr((sorted(options_of(plan.group)), params_of(plan.group))).encode()
                )
                self._known = {id(p): self._known[id(p)] for p in plans if id(p) in self._known}
                self._known[id(plan)] = plan, fixed
            total = crc32(repr(rate_of(plan.group)).encode(), total ^ fixed)
        return total & 0x7FFFFFFF

    def compare_copies(self, plans: Sequence[Plan], groups: Sequence[Group], *, due: bool) -> None:
        """Compares with the processes that hold copies of the parameters, found in the first step.

        Args:
            plans: the optimizer's groups.
            groups: the same groups, of the optimizer.
            due: the answer of `count_step`.

        Raises:
            ValueError: on all of them, if any two differ.
        """
        if due:
            if self._copies is None:
                self._copies = _copies(plans, groups)
                self._parts = [PartComparison(part, groups) for part in self._copies.parts]
            for copies in self._copies.groups:
                self.compare(self.number(plans), groups, copies)
            for part in self._parts:
                part.write(groups)
        elif self._steps % PERIOD == 2:
            for part in self._parts:
                part.read()

    def compare(self, number: int, groups: Sequence[Group], copies: ProcessGroup) -> None:
        """Compares a checksum among copies; all of them call this.

        Raises:
            ValueError: on all of them, if any two differ.
        """
        device = next(
            (param.device for group in groups for param in group["params"]), torch.device("cpu")
        )
        table = torch.tensor([number, -number], dtype=torch.int32, device=device)
        distributed.all_reduce(table, distributed.ReduceOp.MIN, group=copies)
        low, high = table.tolist()
        if low != -high:
            raise unequal(groups, copies)


def unequal(groups: Sequence[Group], processes: ProcessGroup | None) -> ValueError:
    """The error for processes whose options differ; all of them must call this."""
    found = difference(groups, processes)
    return ValueError(
        f"{found or 'options or parameters'} differ between processes that train one model: "
        "accepted are equal options and learning rates on all of them, and weights in 4 or 8 bits "
        "that were equal before they were quantised"
    )


def difference(groups: Sequence[Group], processes: ProcessGroup | None) -> str | None:
    """The first option in which processes differ, with its values; all of them must call this.

    Args:
        groups: the optimizer's.
        processes: whose options are compared; None is all of them.
    """
    own = described(groups)
    everyone: list[Any] = [None] * distributed.get_world_size(processes)
    distributed.all_gather_object(everyone, own, group=processes)
    for rank, other in enumerate(everyone):
        found = first_difference((0, everyone[0]), (rank, other), groups)
        if found is not None:
            return found
    return None


def _copies(plans: Sequence[Plan], groups: Sequence[Group]) -> Copies:
    """Copies of parameters that are whole here, or spread over other processes as DTensors."""
    known = [
        param
        for plan in plans
        for param, shard in zip(plan.params, plan.shards, strict=True)
        if is_dtensor(param) or shard.plain
    ]
    return find_copies(known, groups)
