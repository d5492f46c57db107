"""Refitting bases, transporting the moments, and calling the refresh hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..projectors import Bases, MatrixKey, ProjectedParam, RefreshEvent, telemetry
from .adapt import PendingMoments, transport_pending
from .batching import refresh_batches
from .chunks import wide_dtype
from .composition import Composition, Projection
from .fp32 import exact_fp32
from .moments import transport_moments

RefreshHook = Callable[[RefreshEvent], None]


@dataclass
class Refresh:
    """What a step's refreshes have in common.

    Attributes:
        composition: projection and rule of the matrices.
        hooks: called once for each matrix that has a new basis; events are measured only for them.
        pending: moments to transport after changed options; entries are removed when done.
    """

    composition: Composition
    hooks: Sequence[RefreshHook]
    pending: MutableMapping[MatrixKey, PendingMoments]
    _events: list[RefreshEvent] = field(default_factory=list)
    _unread: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)

    @property
    def projection(self) -> Projection:
        """The projecting half of the composition."""
        assert self.composition.projection is not None
        return self.composition.projection

    def now(self, like: ProjectedParam) -> float:
        """The time in seconds, where somebody is told of it after what a GPU has been given."""
        if self.hooks and like.weight.is_cuda:
            torch.cuda.synchronize(like.weight.device)
        return time.perf_counter()

    def previous(self, param: ProjectedParam) -> Bases:
        """Copies of a matrix's bases, if they will be needed once there are new ones."""
        if not param.fitted or not (self.hooks or self._transports):
            return ()
        return tuple(basis.clone() for basis in self.projection.projector.bases(param))

    @property
    def _transports(self) -> bool:
        return self.projection.options.moments != "keep"

    def finish(self, param: ProjectedParam, previous: Bases, bases: Bases, seconds: float) -> None:
        """Records a refit and transports the moments.

        Args:
            param: the matrix, its new bases stored.
            previous: copies of its previous ones.
            bases: the new ones before storage rounded them, as far as the schedule reads them.
            seconds: time that the refit took.
        """
        number = self.projection.schedule.record(param.state, param.steps_done, bases)
        if number is not None:
            self._unread.append((param.state, number))
        param.read = None
        if self._transports and previous:
            transport_moments(param, previous, self.projection, self.composition.rule)
        moments = self.pending.pop(param.key, None)
        if moments is not None:
            transport_pending(param, moments, self.composition)
        if self.hooks:
            self._events.append(_event(param, self.projection, previous, seconds))

    def conclude(self) -> None:
        """Tells schedule and hooks what was finished since the last call."""
        unread, self._unread = self._unread, []
        if unread:
            numbers = torch.stack([number for _, number in unread]).tolist()
            for (state, _), number in zip(unread, numbers, strict=True):
                self.projection.schedule.decide(state, number)
        events, self._events = self._events, []
        for event in events:
            for hook in self.hooks:
                hook(event)


def refresh_due(params: Sequence[ProjectedParam], count: int, refresh: Refresh) -> bool:
    """Refits the bases of the matrices that are due; `count` is the number of all matrices.

    Returns:
        Whether any was.
    """
    schedule = refresh.projection.schedule
    due = [p for p in params if schedule.due(p.state, p.steps_done, p.index, count)]
    for batch in refresh_batches(due):
        with exact_fp32():
            previous = [refresh.previous(param) for param in batch]
            start = refresh.now(batch[0])
            fits = refresh.projection.projector.fit(batch)
            seconds = (refresh.now(batch[0]) - start) / len(batch)
            for param, old, bases in zip(batch, previous, fits, strict=True):
                if bases is not None:
                    refresh.finish(param, old, bases, seconds)
        refresh.conclude()
    return bool(due)


def _event(
    param: ProjectedParam, projection: Projection, previous: tuple[Tensor, ...], seconds: float
) -> RefreshEvent:
    projector = projection.projector
    bases = projector.bases(param)
    if not (projector.orthonormal and projector.storage.exact):
        # Energy and overlap are defined for orthonormal bases.
        bases, previous = (tuple(_orthonormal(b) for b in t) for t in (bases, previous))
        param.read = bases
    projected = projector.project(param)
    param.read = None
    return RefreshEvent(
        step=param.steps_done + 1,
        name=param.name,
        shape=param.geometry.original_shape,
        rank=param.geometry.rank if projected.dim() > 2 else min(param.geometry.projected_shape()),
        seconds=seconds,
        captured_energy=telemetry.captured_energy(param, projected),
        overlap=telemetry.overlap(previous, bases) if previous else None,
    )


def _orthonormal(basis_dr: Tensor) -> Tensor:
    factor: Tensor = torch.linalg.qr(basis_dr.to(wide_dtype(basis_dr))).Q
    return factor
