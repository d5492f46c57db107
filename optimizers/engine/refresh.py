"""Refitting bases, transporting the moments, and calling the refresh hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor

from ..projectors import ProjectedParam, RefreshEvent, telemetry
from .adapt import PendingMoments, transport_pending
from .chunks import wide_dtype
from .composition import Composition, Projection
from .fp32 import exact_fp32
from .moments import transport_moments

RefreshHook = Callable[[RefreshEvent], None]


def refresh(
    params: Sequence[ProjectedParam],
    composition: Composition,
    hooks: Sequence[RefreshHook],
    pending: MutableMapping[Tensor, PendingMoments],
) -> None:
    """Refits the bases of same-geometry matrices; measures events only if there are hooks.

    Args:
        params: matrices whose refresh is due.
        composition: their projection and rule.
        hooks: called once for each matrix that has a new basis.
        pending: moments to transport after changed options; entries are removed when done.
    """
    with exact_fp32():
        events = _refresh(params, composition, pending, measured=bool(hooks))
    for event in events:
        for hook in hooks:
            hook(event)


def _refresh(
    params: Sequence[ProjectedParam],
    composition: Composition,
    pending: MutableMapping[Tensor, PendingMoments],
    *,
    measured: bool,
) -> list[RefreshEvent]:
    projection = composition.projection
    assert projection is not None
    projector = projection.projector
    moving = projection.options.moments != "keep"
    previous = [
        tuple(basis.clone() for basis in projector.bases(param))
        if (measured or moving) and param.fitted
        else ()
        for param in params
    ]
    start = _now(params[0].weight, measured)
    fitted = projector.fit(params)
    seconds = (_now(params[0].weight, measured) - start) / len(params)
    events = []
    for param, old, bases in zip(params, previous, fitted, strict=True):
        if bases is None:
            continue
        projection.schedule.refreshed(param.state, param.steps_done, bases)
        param.read = None
        if moving and old:
            transport_moments(param, old, projection, composition.rule)
        moments = pending.pop(param.weight, None)
        if moments is not None:
            transport_pending(param, moments, composition)
        if measured:
            events.append(_event(param, projection, old, seconds))
    return events


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
        shape=param.geometry.shape,
        rank=param.geometry.rank if projected.dim() > 2 else min(param.geometry.projected_shape()),
        seconds=seconds,
        captured_energy=telemetry.captured_energy(param.grad, projected),
        overlap=telemetry.overlap(previous, bases) if previous else None,
    )


def _orthonormal(basis_dr: Tensor) -> Tensor:
    factor: Tensor = torch.linalg.qr(basis_dr.to(wide_dtype(basis_dr))).Q
    return factor


def _now(like: Tensor, measured: bool) -> float:
    if measured and like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
