"""Compares the options of optimizers that have a part of a module's parameters, without waiting.

Under DDP a second optimizer may have the other parameters, on all processes alike; or each process
has other parameters (`ZeroRedundancyOptimizer`), and some have none. A reduction could wait for
ever for those. So each process writes what it has to the store through which the processes found
each other, under a name made of its part: processes that have the same part meet there. One that
finds something else leaves a note. Before the next step all gradients have been reduced, so that
all have been there: then all read the note, and raise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from zlib import crc32

from torch import distributed

from .copies import ModelPart
from .described import described, first_difference
from .options import Group
from .warn import warn_user

#: How many optimizers of a part of each kind of module have taken a first step here. All processes
#: count alike, so that the number tells one model from another of its kind.
_seen: Counter[tuple[object, ...]] = Counter()


class PartComparison:
    """The comparisons of an optimizer with those of the same part on other processes.

    Args:
        part: of a module.
        groups: the optimizer's.
    """

    def __init__(self, part: ModelPart, groups: Sequence[Group]) -> None:
        module = (*distributed.get_process_group_ranks(part.group), *part.all_names)
        _seen[module] += 1
        shapes = [[tuple(param.shape) for param in group["params"]] for group in groups]
        kind = crc32(repr((module, part.names, shapes)).encode())
        self._key = f"lowrank/options/{kind:08x}/{_seen[module]}"
        self._note = f"{self._key}/differ"
        self._count, self._known = 0, ""
        self._store = distributed.distributed_c10d._get_default_store()

    def write(self, groups: Sequence[Group]) -> None:
        """Writes what this process has, or leaves a note if another process has something else."""
        self._count += 1
        rank, own = distributed.get_rank(), described(groups)
        text = json.dumps([self._count, rank, own])
        try:
            self._known = self._store.compare_set(self._key, self._known, text).decode()
            count, first, other = json.loads(self._known)
            if count != self._count or other == own:
                return
            pair = sorted([(rank, own), (first, other)], key=lambda known: known[0])
            told = first_difference(pair[0], pair[1], groups)
            self._store.set(self._note, json.dumps([self._count, told]))
        except RuntimeError as error:
            warn_user(f"options of processes can't be compared, as their store fails: {error}")

    def read(self) -> None:
        """Raises `ValueError` if a note was left since the latest `write`."""
        try:
            if not self._store.check([self._note]):
                return
            count, told = json.loads(self._store.get(self._note))
        except RuntimeError:
            return  # `write` says it
        if count == self._count:
            raise ValueError(
                f"{told} differ between processes that train one model, in the step before this "
                "one: accepted are equal options and learning rates on all of them"
            )
