"""Refits shared among processes that train copies of one model (DDP): each refits a part.

Every copy would find the same bases, but for the last bits, in which gradients or cards may differ
and which a decomposition magnifies. Here matrix i of those that are due is refitted by process
i mod world, and sent to the others: a refresh takes 1 / world of the time, and bases are equal to
the bit. What is sent is what is stored, `Projector.state_bytes` (8-bit and 4-bit bases as they are)
and one fp32 vector a matrix with `schedule="lazy"`.

No process decides alone, so that none waits for another one. Before a refresh all agree, by one
small all-reduce, on the matrices: those that have a gradient on every process and are due on any.
They agree as well on how many steps will pass until a matrix can be due anywhere; these take no
communication. A process whose fit fails says so instead of sending, then all keep the previous
basis and try again; one whose fit raises has all of them raise.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor, distributed

from ..projectors import Bases, ProjectedParam
from .batching import refresh_batches
from .chunks import wide_dtype
from .described import rate_of
from .equal_options import difference, unequal
from .fp32 import exact_fp32
from .options import NO_OPTIONS
from .parameters import label
from .refresh import Refresh

if TYPE_CHECKING:
    from .plan import Plan

#: What a process says of a matrix; the smallest answer counts.
ABSENT, DUE, WAITING = 0, 1, 2
#: What a process says of its fits.
RAISED, FAILED, FITTED = -1, 0, 1
#: Most steps without an agreement.
LONGEST_QUIET = 64
#: Matrices that are sent at once.
WINDOW = 16


class SharedRefreshes:
    """The refreshes of one optimizer among the processes of a group.

    Args:
        group: the processes; None is all of them.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                "share_refreshes() without torch.distributed: accepted after "
                "torch.distributed.init_process_group(...)"
            )
        self.group = group
        self.world = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)
        self._steps = 0
        self._quiet: dict[int, tuple[Plan, int]] = {}
        self._warned = False

    def count_step(self) -> None:
        """Called at the begin of each step, on all processes equally often."""
        self._steps += 1

    def refresh_due(
        self, plan: Plan, params: Sequence[ProjectedParam], count: int, refresh: Refresh
    ) -> None:
        """Refits the matrices of a projected group that are due; see `refresh_due`.

        Args:
            plan: the group.
            params: its matrices that have a gradient here.
            count: projected matrices of all groups.
            refresh: how.

        Raises:
            ValueError: the processes' options, rates or parameters differ.
            RuntimeError: they took different numbers of steps, or a fit of one of them raised.
        """
        index = id(plan.group)
        agreed, quiet = self._quiet.get(index, (None, 0))
        if agreed is not plan:
            self._compare(plan)
        elif quiet > 0:
            self._quiet[index] = (plan, quiet - 1)
            return
        held = {(id(param.owner), param.expert): param for param in params}
        matrices = [
            (own, place)
            for i, own in enumerate(plan.params)
            for place in (range(len(own)) if plan.by_expert(i) else [None])
            if own.numel()
        ]
        wanted = [own for own, _ in matrices]
        found = [held.get((id(own), place)) for own, place in matrices]
        schedule = refresh.projection.schedule

        def due(param: ProjectedParam, later: int = 0) -> bool:
            return schedule.due(param.state, param.steps_done + later, param.index, count)

        def quiet_steps() -> int:
            if plan.group["capturable"] or None in found:
                return 0  # steps of replayed graphs are not counted; a gradient may come at once
            for later in range(1, LONGEST_QUIET + 1):
                if any(due(param, later) for param in params):
                    return later - 1
            return LONGEST_QUIET

        codes = [ABSENT if own is None else DUE if due(own) else WAITING for own in found]
        rate = crc32(rate_of(plan.group).encode())
        said = [self._steps, -self._steps, rate, -rate, quiet_steps(), *codes]
        first, last, low, high, quiet, *least = self._smallest(said, wanted[0])
        if low != -high:
            raise unequal([plan.group], self.group)
        if first != -last:
            raise RuntimeError(
                f"processes that share refreshes took {first} to {-last} steps, this one "
                f"{self._steps}: accepted are equally many"
            )
        chosen = [own for own, code in zip(found, least, strict=True) if code == DUE]
        self._warn_of_absent(plan, wanted, codes, least)
        if chosen:
            # All of them are here: no process has said that one is absent.
            quiet = self._refit([own for own in chosen if own is not None], refresh, quiet_steps)
        self._quiet[index] = (plan, quiet)

    def _refit(
        self, params: Sequence[ProjectedParam], refresh: Refresh, quiet_steps: Callable[[], int]
    ) -> int:
        """Refits these matrices together; how many steps will need no agreement."""
        params = sorted(params, key=_cost, reverse=True)  # stable: the same order everywhere
        own = params[self.rank :: self.world]
        with exact_fp32():
            start = refresh.now(params[0])
            error: Exception | None = None
            fits: dict[int, Bases | None] = {}
            previous = {id(param): refresh.previous(param) for param in own}
            try:
                for batch in refresh_batches(own):
                    found = refresh.projection.projector.fit(batch)
                    fits.update({id(p): b for p, b in zip(batch, found, strict=True)})
            except Exception as raised:  # the others must hear of it before it is raised
                error = raised
            answers = [FITTED] * len(params)
            answers[self.rank :: self.world] = (
                [FAILED if fits[id(param)] is None else FITTED for param in own]
                if error is None
                else [RAISED] * len(own)
            )
            known = self._smallest(answers, params[0].weight)
            if RAISED in known:
                where = known.index(RAISED)
                raise RuntimeError(
                    f"the refit of {label(params[where].name, params[where].weight)} failed on "
                    f"process {where % self.world}"
                ) from error
            sent = [i for i, answer in enumerate(known) if answer == FITTED]
            seconds = (refresh.now(params[0]) - start) / len(params)
            for at in range(0, len(sent), WINDOW):
                picked = [(params[i], i % self.world) for i in sent[at : at + WINDOW]]
                for param, owner in picked:
                    if owner != self.rank:
                        previous[id(param)] = refresh.previous(param)
                read = self._send(picked, fits, refresh)
                for (param, owner), columns in zip(picked, read, strict=True):
                    if owner != self.rank:
                        refresh.projection.projector.received(param)
                    refresh.finish(param, previous.pop(id(param)), columns, seconds)
        refresh.conclude()
        return self._smallest([quiet_steps()], params[0].weight)[0]

    def _send(
        self,
        picked: Sequence[tuple[ProjectedParam, int]],
        fits: dict[int, Bases | None],
        refresh: Refresh,
    ) -> list[Bases]:
        """Broadcasts stored bases; what the schedule reads of each before it was stored."""
        width = refresh.projection.schedule.COLUMNS_READ
        pending, read = [], []
        for param, owner in picked:
            entries = refresh.projection.projector.stored(param)
            columns: Bases = ()
            if width:
                bases = fits.get(id(param))
                rows = next(iter(param.geometry.basis_shapes.values()))[0]
                leading = (
                    bases[0][:, :width].contiguous()
                    if bases is not None
                    else entries[0].new_empty(rows, width, dtype=wide_dtype(param.weight))
                )
                columns, entries = (leading,), [*entries, leading]
            source = owner if self.group is None else distributed.get_global_rank(self.group, owner)
            for entry in entries:
                data = entry.view(-1).view(torch.uint8)
                pending.append(distributed.broadcast(data, source, group=self.group, async_op=True))
            read.append(columns)
        for work in pending:
            if work is not None:
                work.wait()
        return read

    def _smallest(self, numbers: Sequence[int], like: Tensor) -> list[int]:
        """The smallest of each of some numbers over all processes."""
        table = torch.tensor(numbers, dtype=torch.int64, device=like.device)
        distributed.all_reduce(table, distributed.ReduceOp.MIN, group=self.group)
        smallest: list[int] = table.tolist()
        return smallest

    def _compare(self, plan: Plan) -> None:
        """Raises `ValueError` on all processes if options or parameters of a group differ.

        So it does for parts of parameters, which are no copies.
        """
        for shard, param, name in zip(plan.shards, plan.params, plan.names, strict=True):
            if not shard.rows.processes.alone:
                raise ValueError(
                    f"share_refreshes() with {label(name, param)} spread over processes: accepted "
                    "are whole copies of a model (DDP)"
                )
        options = sorted(
            (key, repr(value)) for key, value in plan.group.items() if key not in NO_OPTIONS
        )
        shapes = [(tuple(param.shape), str(param.dtype)) for param in plan.params]
        digest = hashlib.sha256(repr((options, shapes, list(plan.seed_names))).encode()).digest()
        number = int.from_bytes(digest[:7], "little")
        like = next(param for param in plan.params if param.numel())
        first, last = self._smallest([number, -number], like)
        if first != -last:
            found = difference([plan.group], self.group) or "their names"
            raise ValueError(
                "processes that share refreshes have groups of different options or parameters, "
                f"{found}: accepted are equal ones"
            )

    def _warn_of_absent(
        self, plan: Plan, wanted: Sequence[Tensor], codes: Sequence[int], least: Sequence[int]
    ) -> None:
        missed = [
            param
            for param, code, known in zip(wanted, codes, least, strict=True)
            if code == DUE and known == ABSENT
        ]
        if missed and not self._warned:
            self._warned = True
            names = {id(own): name for own, name in zip(plan.params, plan.names, strict=True)}
            warnings.warn(
                f"{label(names[id(missed[0])], missed[0])} is due for a refresh and has no "
                "gradient on another process: it is refitted in a step in which it has one on all "
                "(said once)",
                stacklevel=2,
            )


def _cost(param: ProjectedParam) -> int:
    rows, columns = param.geometry.shape
    return rows * columns * min(rows, columns)
