"""Whether the processes of a DDP model would send the same projections: asked after changes.

Equal options, step counts and bases stay equal, since refits are shared, so that they are compared
only before the first projection and after options or state were changed. Compared are checksums:
of options and parameters, of the matrices that are due, and of the stored bases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

from .composition import Projection
from .low_rank_gradients import Place
from .options import NO_OPTIONS
from .parameters import names

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer

#: Bytes that a process sends in a comparison: six 64-bit integers.
BYTES = 48
_COMPARED = ("numbers of steps or refreshes", "options or parameters", "bases")
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

    def due(self) -> bool:
        """Whether options or state were changed since the last comparison."""
        return self._last is None or not self._last.holds(_Known.of(self._optimizer))

    def run(self, places: Mapping[int, Place], device: torch.device) -> None:
        """Compares; all processes must call it.

        Args:
            places: what would travel as projections here.
            device: for which the group has a backend.

        Raises:
            ValueError: on all processes, if any two differ.
        """
        own = [self._history(places), self._options(), _bases_number([*places.values()])]
        table = torch.tensor([*own, *(-number for number in own)], device=device)
        distributed.all_reduce(table, distributed.ReduceOp.MIN, group=self._group)
        least = table.tolist()
        for what, low, high in zip(_COMPARED, least[:3], least[3:], strict=True):
            if low != -high:
                raise ValueError(
                    f"the processes of a model with a low-rank hook have different {what}: "
                    "accepted are equal ones, from equal options and the same loaded state on all "
                    "of them"
                )
        self._last = _Known.of(self._optimizer)

    def _history(self, places: Mapping[int, Place]) -> int:
        entries = ("refreshed_at", "gap")
        return _number(
            [
                (name, place.steps_done, *(place.state.get(entry) for entry in entries))
                for name, param in self._params
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
