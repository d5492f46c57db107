"""A parameter's state after its group's options were changed in the middle of training.

Entries that the change doesn't affect are kept. A subspace of another size or kind is refitted with
the gradient of the first step after the change, and the option `moments` decides about the moments:
"keep" keeps those of the same shape, "restore" and "rotate" transport them by the overlap of the
bases, also between ranks, "reset" sets them to zero. Moments that can't be kept are reset together
with the step count, as in a new optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..projectors import MatrixKey, ProjectedParam
from .composition import Composition, Projection
from .experts import expert_states, experts_here
from .geometry import Geometry
from .sharding import local_part, shard_of

State = dict[str, Any]


def adapt_experts(
    param: Tensor, old: State, previous: Composition, new: State, composition: Composition
) -> dict[MatrixKey, PendingMoments]:
    """`adapt` of each expert that is here, into the new state, in place; arguments are as there."""
    if not (previous.by_expert(param.shape) and composition.by_expert(param.shape)):
        return {}
    pending: dict[MatrixKey, PendingMoments] = {}
    pairs = zip(expert_states(old), expert_states(new), experts_here(param), strict=True)
    for before, after, (place, weight_mn) in pairs:
        made, moments = adapt(weight_mn, before, previous, after, composition)
        for key, value in made.items():
            if not isinstance(value, Tensor):
                if value != after[key]:
                    after[key] = value
            elif value is not after[key]:
                after[key].copy_(value)
        if moments is not None:
            pending[param, place] = moments
    return pending


@dataclass(frozen=True)
class PendingMoments:
    """A previous state whose moments are transported once the new basis is fitted.

    Attributes:
        state: the previous state.
        composition: the composition that made it.
    """

    state: State
    composition: Composition


def adapt(
    param: Tensor, old: State, previous: Composition, new: State, composition: Composition
) -> tuple[State, PendingMoments | None]:
    """The state of a parameter, after at least one step, under a new composition.

    Args:
        param: the parameter.
        old: its state.
        previous: the composition that made it.
        new: the result of `composition.init_state`.
        composition: the new composition.

    Returns:
        The state, and the moments to transport once the basis is fitted, if any.
    """
    before, after = previous.projection, composition.projection
    if before is None or after is None:
        if before is not after:
            return new, None
        made = {**new, "step": old["step"]}
        made |= {key: old[key] for key in composition.counters if key in old}
        return (made if _carry_moments(param, old, previous, made, composition) else new), None
    if _resets(before) and not _resets(after):
        # Bias corrections count all steps again: count only those that the moments have averaged.
        seen = max(int(old["refreshed_at"]), 0)
        old = {**old, "step": old["step"] - seen, "refreshed_at": old["refreshed_at"] - seen}
    made = {**new, "step": old["step"]}
    meta = param.to("meta")
    shapes = before.geometry(param.shape), after.geometry(param.shape)
    if before.residual == after.residual:
        wanted = after.residual.init(shapes[1], local_part(meta))
        kept = {key for key, value in wanted.items() if _alike(value, local_part(old[key]))}
        made |= {key: old[key] for key in kept}
    basis = after.projector.init(shapes[1], meta)
    starts = _resets(after) and not _resets(before)
    if not starts and shapes[0] == shapes[1] and _same_bases(before, after, basis, old):
        made |= {key: old[key] for key in basis}
        after.schedule.carry(before.schedule, old, made)
        return (made if _carry_moments(param, old, previous, made, composition) else new), None
    return _refitted(param, old, previous, new, made, composition)


def _resets(projection: Projection) -> bool:
    """Whether each refresh resets the moments and the step count of their bias corrections."""
    return projection.options.moments == "reset"


def _same_bases(before: Projection, after: Projection, basis: State, old: State) -> bool:
    """Whether stored bases can be kept; `basis` has the entries that the new projector needs."""
    projector, previous = after.projector, before.projector
    if type(projector) is not type(previous) or projector.storage != previous.storage:
        return False
    if not basis:  # drawn from a seed whenever they are read
        return replace(previous, dtype=projector.dtype) == projector
    return all(key in old and _alike(value, old[key]) for key, value in basis.items())


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.shape == other.shape and value.dtype == other.dtype)
    return bool(value == other)


def _carry_moments(
    param: Tensor, old: State, previous: Composition, made: State, composition: Composition
) -> bool:
    """In place: fills the rule's entries of `made`; False if the moments must be reset."""
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
) -> tuple[State, PendingMoments | None]:
    """`adapt` where the basis must be refitted."""
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
    return made, PendingMoments(old, previous)


def _same_axes(first: Geometry, second: Geometry) -> bool:
    """Whether both project the same axes of the same matrix; the ranks may differ."""
    same_heads: bool = getattr(first, "heads", None) == getattr(second, "heads", None)
    return type(first) is type(second) and first.side is second.side and same_heads


def transport_pending(
    param: ProjectedParam, pending: PendingMoments, composition: Composition
) -> None:
    """In place: transports moments into a newly fitted basis of another size or kind."""
    before, after = pending.composition.projection, composition.projection
    assert before is not None
    assert after is not None
    geometry, state = before.geometry(param.owner.shape), pending.state
    if param.expert is None:
        shard = shard_of(param.owner)
        geometry = shard.seen(geometry)
        state = shard.local_state(state, geometry)
    place = replace(param, state=state, geometry=geometry, read=None)
    rotation = after.projector.rotation(param, before.projector.bases(place))
    composition.rule.transport_moments(state, after.options.moments, rotation, into=param.state)
