"""Whether the processes of a DDP model would send the same projections.

Each backward pass begins with it, since processes that send different numbers of bytes would wait
for each other for ever: a checksum of what is sent as a projection, after how many steps and at
which learning rates. Options and bases are compared in addition before the first projection, and
after options or state were changed on any process; equal ones stay equal, since refits are shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

from .composition import Projection
from .equal_options import difference
from .low_rank_gradients import Place
from .options import NO_OPTIONS
from .parameters import names

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer

#: Bytes that a process sends at each backward pass, and in addition after a change.
EACH, CHANGED = 24, 32
_CHUNK = 1 << 22  # bytes of a basis at once


class Comparison:
    """The comparisons of one optimizer.

    Args:
        params: the parameters that travel, by name.
        optimizer: theirs.
        group: the processes.
    """

    def __init__(
        self,
        params: Sequence[tuple[str, Tensor]],
        optimizer: LowRankOptimizer,
        group: distributed.ProcessGroup,
    ) -> None:
        self._params, self._optimizer, self._group = params, optimizer, group
        self._last: _Known | None = None

    def changed(self) -> bool:
        """Whether options or state were changed since they were compared."""
        return self._last is None or not self._last.holds(_Known.of(self._optimizer))

    def run(self, places: Mapping[int, Place], device: torch.device) -> None:
        """Compares; all processes must call it.

        Args:
            places: what would travel as projections here.
            device: for which the group has a backend.

        Raises:
            ValueError: on all processes, if any two differ.
        """
        own, unchanged = self._sent(places), int(not (places and self.changed()))
        low, high, unchanged = self._smallest([own, -own, unchanged], device)
        if low != -high:
            raise self._different("numbers of steps or refreshes, or a change on some of them only")
        if unchanged:
            return
        options, bases = self._options(), _bases_number([*places.values()])
        least = self._smallest([options, -options, bases, -bases], device)
        for what, low, high in zip(
            ("options or parameters", "bases"), least[::2], least[1::2], strict=True
        ):
            if low != -high:
                raise self._different(what)
        self._last = _Known.of(self._optimizer)

    def _smallest(self, numbers: list[int], device: torch.device) -> list[int]:
        """The least of these numbers over all processes."""
        table = torch.tensor(numbers, dtype=torch.int64, device=device)
        distributed.all_reduce(table, distributed.ReduceOp.MIN, group=self._group)
        smallest: list[int] = table.tolist()
        return smallest

    def _different(self, what: str) -> ValueError:
        found = difference(self._optimizer.param_groups, self._group)
        return ValueError(
            "the processes of a model with a low-rank hook have different "
            f"{what if found is None else f'options or parameters, {found}'}: accepted are equal "
            "options and learning rates, equally many steps and the same loaded state on all of "
            "them"
        )

    def _sent(self, places: Mapping[int, Place]) -> int:
        # A rate on a GPU would have to be waited for.
        rates = [group["lr"] for group in self._optimizer.param_groups]
        known = [lr for lr in rates if not (isinstance(lr, Tensor) and lr.is_cuda)]
        return _number(
            [lr if lr is None else float(lr) for lr in known]
            + [
                (position, place.entries(), place.steps_done, place.state["refreshed_at"])
                for position, (_, param) in enumerate(self._params)
                if (place := places.get(id(param))) is not None
            ]
        )

    def _options(self) -> int:
        return _number(
            [
                (
                    sorted((k, repr(v)) for k, v in group.items() if k not in NO_OPTIONS),
                    [(tuple(param.shape), str(param.dtype)) for param in group["params"]],
                    list(names(group)),
                )
                for group in self._optimizer.param_groups
            ]
        )


class _Known(NamedTuple):
    """The bases that processes have compared: known by their projections and step counts."""

    projections: list[Projection]
    counts: list[Tensor]

    @classmethod
    def of(cls, optimizer: LowRankOptimizer) -> _Known:
        known = cls([], [])
        for group in optimizer.param_groups:
            plan = optimizer._plan_of(group)
            if plan is None or plan.core.projection is None:
                continue
            projection = plan.core.projection
            if projection.residual.READS_GRADIENT or projection.projector.TRACKS:
                continue
            known.projections.append(projection)
            states = [optimizer.state[param] for param in plan.params if param.numel()]
            known.counts.extend(state["step"] for state in states)
        return known

    def holds(self, now: _Known) -> bool:
        return (
            self.projections == now.projections
            and len(self.counts) == len(now.counts)
            and all(map(is_, self.counts, now.counts))
        )


def _number(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "little")


def _bases_number(places: Sequence[Place]) -> int:
    """A checksum of the stored bases, the same on every device."""
    sums = []
    for place in places:
        if not place.projector.FITS_GRADIENT:
            continue  # each process draws it, from what was compared already
        for tensor in place.projector.stored(place._of(place.plan.params[place.position])):
            data = tensor.detach().reshape(-1).view(torch.uint8)
            total = torch.zeros((), dtype=torch.int64, device=tensor.device)
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK].to(torch.int64)
                weights = torch.arange(start, start + len(part), device=part.device)
                total += (part * (2 * weights + 1)).sum()
            sums.append(total)
    return _number(torch.stack(sums).tolist() if sums else [])
