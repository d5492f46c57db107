"""A parameter's state after its group's options were changed in the middle of training.

What the options leave as it is stays. A subspace of another size or kind is refitted at once, by
the gradient of the step that saw the change, and the moments follow as the option `moments` says:
"keep" keeps those of the same shape, "restore" and "rotate" carry them over by the overlap of the
bases, also between ranks, "reset" sets them to zero. Moments that can't be kept start anew, and
the step count with them, as in a new optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..projectors import ProjectedParam
from .composition import Composition, Projection
from .geometry import Geometry

State = dict[str, Any]


@dataclass(frozen=True)
class Former:
    """A state whose moments are to be carried into a basis that is not fitted yet.

    Attributes:
        state: the state before.
        composition: what made it.
    """

    state: State
    composition: Composition


def adapt(
    param: Tensor, old: State, previous: Composition, new: State, composition: Composition
) -> tuple[State, Former | None]:
    """The state of a parameter that has taken steps, under a new composition.

    Args:
        param: the parameter.
        old: its state.
        previous: what made it.
        new: what `composition.init_state` made.
        composition: the new one.

    Returns:
        The state, and what is to be carried over once there is a basis.
    """
    before, after = previous.projection, composition.projection
    if before is None or after is None:
        if before is not after:
            return new, None
        made = {**new, "step": old["step"]}
        made |= {key: old[key] for key in composition.counters if key in old}
        return (made if _carry_moments(param, old, previous, made, composition) else new), None
    if _resets(before) and not _resets(after):
        # Bias corrections count all steps again: let these be the ones that the moments have seen.
        seen = max(int(old["refreshed_at"]), 0)
        old = {**old, "step": old["step"] - seen, "refreshed_at": old["refreshed_at"] - seen}
    made = {**new, "step": old["step"]}
    meta = param.to("meta")
    shapes = before.geometry(param.shape), after.geometry(param.shape)
    if before.residual == after.residual:
        made |= {key: old[key] for key in after.residual.init(shapes[1], meta)}
    basis = after.projector.init(shapes[1], meta)
    starts = _resets(after) and not _resets(before)
    if not starts and shapes[0] == shapes[1] and _same_bases(before, after, basis, old):
        made |= {key: old[key] for key in basis}
        after.schedule.carry(before.schedule, old, made)
        return (made if _carry_moments(param, old, previous, made, composition) else new), None
    return _refitted(param, old, previous, new, made, composition)


def _resets(projection: Projection) -> bool:
    """Whether moments start anew at each refresh, and bias corrections count from there."""
    return projection.options.moments == "reset"


def _same_bases(before: Projection, after: Projection, basis: State, old: State) -> bool:
    """Whether stored bases mean the same; `basis` has the entries that are wanted."""
    projector, former = after.projector, before.projector
    if type(projector) is not type(former) or projector.storage != former.storage:
        return False
    if not basis:  # drawn from a seed whenever they are read
        return replace(former, dtype=projector.dtype) == projector
    return all(key in old and _alike(value, old[key]) for key, value in basis.items())


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.shape == other.shape and value.dtype == other.dtype)
    return bool(value == other)


def _carry_moments(
    param: Tensor, old: State, previous: Composition, made: State, composition: Composition
) -> bool:
    """In place: the rule's entries of `made`; False if they have to start anew."""
    own = {key: made[key] for key in composition.moments(param.to("meta"))}
    carried = composition.rule.carry(previous.rule, old, own)
    made |= own
    return carried


def _refitted(
    param: Tensor,
    old: State,
    previous: Composition,
    new: State,
    made: State,
    composition: Composition,
) -> tuple[State, Former | None]:
    """The same where the basis is to be fitted anew."""
    assert previous.projection is not None
    assert composition.projection is not None
    how = composition.projection.options.moments
    if how == "reset":
        return made, None
    if not _same_axes(
        previous.projection.geometry(param.shape), composition.projection.geometry(param.shape)
    ):
        return new, None
    if how == "keep":
        return (made if _carry_moments(param, old, previous, made, composition) else new), None
    if type(previous.rule) is not type(composition.rule) or old["refreshed_at"] < 0:
        return new, None
    return made, Former(old, previous)


def _same_axes(first: Geometry, second: Geometry) -> bool:
    """Whether both project the same axes of the same matrix, of whatever ranks."""
    same_heads: bool = getattr(first, "heads", None) == getattr(second, "heads", None)
    return type(first) is type(second) and first.side is second.side and same_heads


def transport_former(param: ProjectedParam, former: Former, composition: Composition) -> None:
    """In place: carries moments into a basis of another size or kind that was just fitted."""
    before, after = former.composition.projection, composition.projection
    assert before is not None
    assert after is not None
    geometry = before.geometry(param.weight.shape)
    place = replace(param, state=former.state, geometry=geometry, read=None)
    rotation = after.projector.rotation(param, before.projector.bases(place))
    composition.rule.transport_moments(
        former.state, after.options.moments, rotation, into=param.state
    )
