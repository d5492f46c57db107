"""One step of a group's projected matrices: refresh what is due, project, update, write back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..projectors import Slot
from ..rules import UpdateRule
from .batching import refresh_batches, update_batches
from .composition import Composition, Projection
from .geometry import RowRange, Side
from .gradients import descent_gradient, label, names
from .moments import move_moments
from .options import Group
from .refresh import RefreshHook, refresh
from .write import carry_out

#: Positions of the tensors to go on with, given tensors and what to call each.
Finite = Callable[[Sequence[Tensor], Callable[[int], str]], list[int]]


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def make_slots(
    group: Group, composition: Composition, state: dict[Tensor, dict[str, Any]], first: int
) -> list[Slot]:
    """A slot for each parameter that has a gradient.

    Args:
        group: a group with a projection.
        composition: what its options mean.
        state: the optimizer's state.
        first: projected matrices before this group.
    """
    assert composition.projection is not None
    slots = []
    for offset, (param, name) in enumerate(zip(group["params"], names(group), strict=True)):
        grad = descent_gradient(param, name, group)
        if grad is not None:
            own = state[param]
            slots.append(
                Slot(
                    param=param,
                    grad=grad,
                    state=own,
                    geometry=composition.projection.geometry(param.shape),
                    rows=RowRange.whole(param.shape[0]),
                    index=first + offset,
                    taken=0 if capturing() else int(own["step"]),
                    name=name,
                    first_moment=partial(composition.rule.first_moment, own),
                )
            )
    return slots


def refresh_due(
    slots: Sequence[Slot], composition: Composition, count: int, hooks: Sequence[RefreshHook]
) -> None:
    """Refits the bases of the matrices whose turn it is, of `count` in all."""
    projection = composition.projection
    assert projection is not None
    due = [
        slot for slot in slots if projection.schedule.due(slot.state, slot.taken, slot.index, count)
    ]
    for batch in refresh_batches(due):
        refresh(batch, composition, hooks)


def step_projected(
    group: Group, composition: Composition, slots: Sequence[Slot], finite: Finite
) -> None:
    """Takes the step of these matrices, in batches of bounded scratch."""
    projection = composition.projection
    assert projection is not None
    states = {slot.param: slot.state for slot in slots}
    for indices in update_batches([slot.param for slot in slots], states, group):
        batch = [slots[i] for i in indices]
        lows = [projection.projector.project(slot) for slot in batch]
        # A non-finite gradient always shows in its projection, which is smaller to read.
        called = [label(slot.name, slot.param) for slot in batch]
        kept = finite(lows, called.__getitem__)
        batch, lows = [batch[i] for i in kept], [lows[i] for i in kept]
        if not batch:
            continue
        torch._foreach_add_([slot.state["step"] for slot in batch], 1)
        states_of_batch = [slot.state for slot in batch]
        params = [slot.param for slot in batch]
        if projection.residual.NORMS:
            axes = [0 if slot.geometry.side is Side.LEFT else 1 for slot in batch]
            updates = composition.rule.update_with_norms(lows, states_of_batch, params, axes)
        else:
            updates = composition.rule.update(lows, states_of_batch, params)
        for slot, low, update in zip(batch, lows, updates, strict=True):
            write = projection.residual.plan(slot, low, update, projection.projector)
            carry_out(write, slot, projection)
            if projection.projector.TRACKS:
                _track(slot, low, projection, composition.rule)
            slot.read = None


def _track(slot: Slot, low: Tensor, projection: Projection, rule: UpdateRule) -> None:
    how = projection.options.moments
    former = () if how == "keep" else tuple(b.clone() for b in projection.projector.bases(slot))
    projection.projector.track(slot, low)
    slot.read = None
    if former:
        move_moments(slot, former, projection, rule)
