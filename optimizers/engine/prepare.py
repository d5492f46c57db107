"""Before a step: options, parameters and state are checked and made consistent.

Everything is checked before anything is changed, so that an error leaves the optimizer unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..projectors import MatrixKey
from .adapt import PendingMoments, adapt, adapt_experts
from .composition import Composition
from .options import Group
from .parameters import check_exchanged, check_names, check_param, label, names
from .plan import SCALARS, Plan, Snapshot
from .seeds import seed_names
from .state import difference, misplaced, place, template, untouched
from .warn import warn_user

State = dict[str, Any]
States = MutableMapping[Tensor, State]


class MadeBy(NamedTuple):
    """What a parameter's state was made with.

    Attributes:
        composition: of the group's options; None for the one that they have now.
        dtype: the parameter's, if known.
    """

    composition: Composition | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Maker:
    """The optimizer's callbacks for groups and state.

    Attributes:
        complete: checks a group whose options were changed since a snapshot, completes it in place,
            and returns its composition.
        make: makes a new state for a parameter.
        changed: called with a group and its previous options after a change of options.
        fixed: options that can't be changed.
    """

    complete: Callable[[Group, Snapshot | None], Composition]
    make: Callable[[Tensor, Composition, Group], State]
    changed: Callable[[Group, Group], None]
    fixed: Sequence[str]


@dataclass(frozen=True)
class _StateChange:
    """A pending change of a parameter's state: make it, move it to a device, or adapt it.

    Attributes:
        param: the parameter.
        how: "make", "move" or "adapt".
        previous: the composition that made the present state.
    """

    param: Tensor
    how: str
    previous: Composition | None = None


@dataclass(frozen=True)
class _GroupChange:
    """The pending changes of a group, none of which is applied yet.

    Attributes:
        group: the group.
        completed: its new keys and values.
        core: their composition.
        snapshot: of these options.
        state_changes: pending changes of the parameters' state.
        before: the previous options, if any were changed.
    """

    group: Group
    completed: Group
    core: Composition
    snapshot: Snapshot
    state_changes: list[_StateChange]
    before: Group | None = None


def revise(
    groups: Sequence[Group],
    plans: Sequence[Plan | None],
    state: States,
    previous: Mapping[int, MadeBy],
    snapshots: Sequence[Snapshot | None],
    maker: Maker,
) -> tuple[list[Plan], dict[MatrixKey, PendingMoments]]:
    """Plans of all groups, after making their state consistent.

    Args:
        groups: the optimizer's groups.
        plans: the cached plan of each, if any.
        state: the optimizer's state, changed in place.
        previous: by parameter id, what its state was made with.
        snapshots: options of each group when its state was made, if known.
        maker: the optimizer's callbacks.

    Returns:
        The plans, and moments to transport at the refreshes of this step.

    Raises:
        ValueError: options, parameters and state are inconsistent; nothing is changed then.
    """
    changes = [
        _examine_group(group, plan, snapshot, state, previous, maker)
        for group, plan, snapshot in zip(groups, plans, snapshots, strict=True)
    ]
    drop_unused(groups, state)
    pending: dict[MatrixKey, PendingMoments] = {}
    begun: list[Tensor] = []
    for change in changes:
        _complete(change.group, change.completed)
        for state_change in change.state_changes:
            pending |= _apply_change(state_change, change, state, maker, begun)
        if change.before is not None:
            maker.changed(change.group, change.before)
    if begun:
        warn_user(
            f"options were changed so that moments of {len(begun)} parameters don't fit them: "
            "these begin anew, with their step count (said once)"
        )
    revised = zip(changes, seed_names(groups), strict=True)
    return [Plan(r.group, r.core, state, r.snapshot, drawn) for r, drawn in revised], pending


def _complete(group: Group, completed: Group) -> None:
    for key in group.keys() - completed.keys():
        del group[key]
    group.update(completed)


def _apply_change(
    state_change: _StateChange,
    change: _GroupChange,
    state: States,
    maker: Maker,
    begun: list[Tensor],
) -> dict[MatrixKey, PendingMoments]:
    """Changes a parameter's state; `begun` gets the parameter where its moments are lost."""
    param = state_change.param
    if state_change.how == "move":
        place(state[param], param, capturable=change.group["capturable"])
        return {}
    new, pending = maker.make(param, change.core, change.group), {}
    previous = state_change.previous
    if previous is not None and any(c.by_expert(param.shape) for c in (previous, change.core)):
        pending = adapt_experts(param, state[param], previous, new, change.core)
    elif previous is not None:
        made, moments = adapt(param, state[param], previous, new, change.core)
        if made is new and moments is None and previous.moments(param.to("meta")):
            begun.append(param)
        new, pending = made, {} if moments is None else {param: moments}
    state[param] = new
    return pending


def drop_unused(groups: Sequence[Group], state: States) -> list[Tensor]:
    """In place: removes untrained state of parameters that are no longer in any group.

    Returns:
        Parameters in no group whose state was trained, which is kept.
    """
    used = {param for group in groups for param in group["params"]}
    unused = [key for key in state if isinstance(key, Tensor) and key not in used]
    for param in unused:
        if not state[param] or untouched(state[param]):
            del state[param]
    return [param for param in unused if param in state]


def follow(
    groups: Sequence[Group], plans: Sequence[Plan | None], state: States, maker: Maker
) -> None:
    """In place: makes state that is missing or untrained; errors are left to the next step."""
    for group, plan in zip(groups, plans, strict=True):
        if plan is None or not plan.current():
            continue
        settled = plan.settled(state)
        plan.release()
        for param in () if settled else group["params"]:
            try:
                found = _examine(param, None, state.get(param), None, plan.core, group)
            except ValueError:
                continue
            if found is not None and found.how == "make":
                state[param] = maker.make(param, plan.core, group)


def _examine_group(
    group: Group,
    plan: Plan | None,
    snapshot: Snapshot | None,
    state: States,
    previous: Mapping[int, MadeBy],
    maker: Maker,
) -> _GroupChange:
    if plan is not None:
        check_exchanged(group, plan.params, plan.names, lambda p: not untouched(state.get(p, {})))
    check_names(group)
    if plan is not None and plan.current():
        plan.read_rate()
        if plan.settled(state):
            return _GroupChange(group, group, plan.core, plan.snapshot, [])
        core, completed, before, snapshot = plan.core, group, None, plan.snapshot
    else:
        changed = None if snapshot is None else snapshot.changed(group)
        for name in (changed or set()) & {*maker.fixed}:
            assert snapshot is not None
            raise ValueError(
                f"{name}={group.get(name)!r}, changed after construction: accepted is "
                f"{snapshot.options.get(name)!r}"
            )
        completed = {**group}
        core = maker.complete(completed, snapshot)
        if plan is not None and core == plan.core:
            core = plan.core  # the change does not affect the composition
        before = snapshot.options if changed and snapshot else None
        snapshot = Snapshot(completed)
        affects = changed is None or not changed <= SCALARS or _switches_moment(before, completed)
        if plan is not None and not affects and plan.settled(state):
            return _GroupChange(group, completed, core, snapshot, [], before)
    found = {  # by id: torch lets a parameter be in a group twice
        id(param): _examine(param, name, state.get(param), previous.get(id(param)), core, completed)
        for param, name in zip(group["params"], names(group), strict=True)
    }
    state_changes = [state_change for state_change in found.values() if state_change is not None]
    return _GroupChange(group, completed, core, snapshot, state_changes, before)


def _switches_moment(before: Group | None, after: Group) -> bool:
    """Whether a momentum was switched on or off; its entry of the state comes or goes."""
    return before is not None and bool(before.get("momentum")) != bool(after.get("momentum"))


def _examine(
    param: Tensor,
    name: str | None,
    state: State | None,
    previous: MadeBy | None,
    core: Composition,
    group: Group,
) -> _StateChange | None:
    """The change that a parameter's state needs, or None."""
    check_param(param, name, core)
    if not param.numel():
        return None
    if not state:
        return _StateChange(param, "make")
    composition, dtype = previous or MadeBy(None, None)
    made_by = composition or core
    expected = template(param, made_by)
    found = difference(state, expected)
    if found is None and dtype not in (None, param.dtype):
        found = f"was made for {dtype}; the parameter is {param.dtype}"
    if found is not None:
        if expected.keys() == state.keys() and untouched(state):
            return _StateChange(param, "make")
        cast = dtype not in (None, param.dtype)
        hint = ": cast the model first, then build the optimizer" if cast else ""
        raise ValueError(f"the state of {label(name, param)} {found}{hint}")
    moved = misplaced(state, param, capturable=group["capturable"])
    if (moved or made_by is not core) and untouched(state):
        return _StateChange(param, "make")
    if made_by is not core:
        return _StateChange(param, "adapt", made_by)
    return _StateChange(param, "move") if moved else None
