"""Refitting bases, moving the moments along, and telling those who listen what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..projectors import RefreshEvent, Slot, telemetry
from ..projectors.operand import compute_dtype
from .composition import Composition, Projection
from .moments import move_moments

RefreshHook = Callable[[RefreshEvent], None]


def refresh(slots: Sequence[Slot], composition: Composition, hooks: Sequence[RefreshHook]) -> None:
    """Refits the bases of same-geometry matrices; measures what hooks are told only if any listen.

    Args:
        slots: matrices whose refresh is due.
        composition: their projection and rule.
        hooks: called once for each matrix that has a new basis.
    """
    projection = composition.projection
    assert projection is not None
    projector = projection.projector
    moving = projection.options.moments != "keep"
    former = [
        tuple(basis.clone() for basis in projector.bases(slot))
        if (hooks or moving) and slot.fitted
        else ()
        for slot in slots
    ]
    start = _now(slots[0].param, hooks)
    fitted = projector.fit(slots)
    seconds = (_now(slots[0].param, hooks) - start) / len(slots)
    for slot, old, bases in zip(slots, former, fitted, strict=True):
        if bases is None:
            continue
        projection.schedule.refreshed(slot.state, slot.taken, bases)
        slot.read = None
        if moving and old:
            move_moments(slot, old, projection, composition.rule)
        if hooks:
            event = _event(slot, projection, old, seconds)
            for hook in hooks:
                hook(event)


def _event(
    slot: Slot, projection: Projection, former: tuple[Tensor, ...], seconds: float
) -> RefreshEvent:
    projector = projection.projector
    bases = projector.bases(slot)
    if not (projector.orthonormal and projector.storage.exact):
        # Energy and overlap are those of the subspaces.
        bases, former = (tuple(_orthonormal(b) for b in t) for t in (bases, former))
        slot.read = bases
    low = projector.project(slot)
    slot.read = None
    return RefreshEvent(
        step=slot.taken + 1,
        name=slot.name,
        shape=slot.geometry.shape,
        rank=slot.geometry.rank if low.dim() > 2 else min(slot.geometry.low_shape()),
        seconds=seconds,
        captured_energy=telemetry.captured_energy(slot.grad, low),
        overlap=telemetry.overlap(former, bases) if former else None,
    )


def _orthonormal(basis_dr: Tensor) -> Tensor:
    factor: Tensor = torch.linalg.qr(basis_dr.to(compute_dtype(basis_dr.dtype))).Q
    return factor


def _now(like: Tensor, hooks: Sequence[RefreshHook]) -> float:
    if hooks and like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
