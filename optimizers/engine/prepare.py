"""Before a step: options, parameters and state are checked and made to fit each other.

Everything is looked at before anything is changed, so that an error leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .adapt import Former, adapt
from .composition import Composition
from .options import Group
from .parameters import check_exchanged, check_names, check_param, label, names
from .plan import SCALARS, Plan, Snapshot
from .seeds import seed_names
from .state import difference, misplaced, place, template, untouched

State = dict[str, Any]
States = MutableMapping[Tensor, State]


@dataclass(frozen=True)
class Maker:
    """What an optimizer says of its groups and parameters.

    Attributes:
        complete: checks a group whose options were changed since a snapshot, completes it in place,
            and says what it means.
        make: a new state for a parameter.
        changed: called with a group, and with its options before, after these were changed.
        fixed: options that can't be changed.
    """

    complete: Callable[[Group, Snapshot | None], Composition]
    make: Callable[[Tensor, Composition, Group], State]
    changed: Callable[[Group, Group], None]
    fixed: Sequence[str]


@dataclass(frozen=True)
class _Remake:
    """A parameter's state that is to be made, moved to its device, or adapted.

    Attributes:
        param: the parameter.
        how: "make", "move" or "adapt".
        previous: what made the present state.
    """

    param: Tensor
    how: str
    previous: Composition | None = None


@dataclass(frozen=True)
class _Revision:
    """What was found out about a group, nothing of which is done yet.

    Attributes:
        group: the group.
        completed: its keys and values as they are to be.
        core: what they mean.
        snapshot: of these options.
        remakes: what is to be done to parameters' state.
        before: options that were changed since, if any were.
    """

    group: Group
    completed: Group
    core: Composition
    snapshot: Snapshot
    remakes: list[_Remake]
    before: Group | None = None


def revise(
    groups: Sequence[Group],
    plans: Sequence[Plan | None],
    state: States,
    previous: Mapping[int, Composition],
    snapshots: Sequence[Snapshot | None],
    maker: Maker,
) -> tuple[list[Plan], dict[Tensor, Former]]:
    """Plans of all groups, after their state was made to fit.

    Args:
        groups: the optimizer's groups.
        plans: what is known of each, if anything.
        state: the optimizer's state, changed in place.
        previous: by a parameter's id, what made its state.
        snapshots: options of each group when its state was made, if known.
        maker: what the optimizer says.

    Returns:
        The plans, and moments that are to be carried over at the refreshes of this step.

    Raises:
        ValueError: options, parameters and state don't go together; nothing is changed then.
    """
    revisions = [
        _examine_group(group, plan, snapshot, state, previous, maker)
        for group, plan, snapshot in zip(groups, plans, snapshots, strict=True)
    ]
    drop_unused(groups, state)
    formers: dict[Tensor, Former] = {}
    for revision in revisions:
        _complete(revision.group, revision.completed)
        for remake in revision.remakes:
            former = _carry_out(remake, revision, state, maker)
            if former is not None:
                formers[remake.param] = former
        if revision.before is not None:
            maker.changed(revision.group, revision.before)
    revised = zip(revisions, seed_names(groups), strict=True)
    return [Plan(r.group, r.core, state, r.snapshot, drawn) for r, drawn in revised], formers


def _complete(group: Group, completed: Group) -> None:
    for key in group.keys() - completed.keys():
        del group[key]
    group.update(completed)


def _carry_out(remake: _Remake, revision: _Revision, state: States, maker: Maker) -> Former | None:
    param = remake.param
    if remake.how == "move":
        place(state[param], param, capturable=revision.group["capturable"])
        return None
    new, former = maker.make(param, revision.core, revision.group), None
    if remake.how == "adapt":
        assert remake.previous is not None
        new, former = adapt(param, state[param], remake.previous, new, revision.core)
    state[param] = new
    return former


def drop_unused(groups: Sequence[Group], state: States) -> list[Tensor]:
    """In place: leaves out state without a step of parameters that no group has any more.

    Returns:
        Such parameters whose state has steps.
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
    """In place: makes state that is missing or has no step yet; leaves errors to the next step."""
    for group, plan in zip(groups, plans, strict=True):
        if plan is None or not plan.current() or plan.settled(state):
            continue
        for param in group["params"]:
            try:
                found = _examine(param, None, state.get(param), plan.core, plan.core, group)
            except ValueError:
                continue
            if found is not None and found.how == "make":
                state[param] = maker.make(param, plan.core, group)


def _examine_group(
    group: Group,
    plan: Plan | None,
    snapshot: Snapshot | None,
    state: States,
    previous: Mapping[int, Composition],
    maker: Maker,
) -> _Revision:
    if plan is not None:
        check_exchanged(group, plan.params, plan.names)
    check_names(group)
    if plan is not None and plan.current():
        plan.read_rate()
        if plan.settled(state):
            return _Revision(group, group, plan.core, plan.snapshot, [])
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
            core = plan.core  # what was changed is no option of it
        before, snapshot = snapshot.options if changed and snapshot else None, Snapshot(completed)
        if plan is not None and changed is not None and changed <= SCALARS and plan.settled(state):
            return _Revision(group, completed, core, snapshot, [], before)
    found = [
        _examine(param, name, state.get(param), previous.get(id(param)), core, completed)
        for param, name in zip(group["params"], names(group), strict=True)
    ]
    remakes = [remake for remake in found if remake is not None]
    return _Revision(group, completed, core, snapshot, remakes, before)


def _examine(
    param: Tensor,
    name: str | None,
    state: State | None,
    previous: Composition | None,
    core: Composition,
    group: Group,
) -> _Remake | None:
    """What has to be done to a parameter's state."""
    check_param(param, name, core)
    if not param.numel():
        return None
    if not state:
        return _Remake(param, "make")
    made_by = core if previous is None else previous
    expected = template(param, made_by)
    found = difference(state, expected)
    if found is not None:
        if expected.keys() == state.keys() and untouched(state):
            return _Remake(param, "make")
        called = label(name, param)
        hint = ", as the parameter is: cast the model first, then build the optimizer"
        raise ValueError(f"the state of {called} {found}{hint if 'of dtype' in found else ''}")
    moved = misplaced(state, param, capturable=group["capturable"])
    if (moved or made_by is not core) and untouched(state):
        return _Remake(param, "make")
    if made_by is not core:
        return _Remake(param, "adapt", made_by)
    return _Remake(param, "move") if moved else None
