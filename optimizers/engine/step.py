"""One step of a projected group: refresh, project, update, write back."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..projectors import MatrixKey, ProjectedParam
from ..rules import UpdateRule
from ..weights import rounding_seeds, rounds
from .adapt import PendingMoments
from .batching import read_steps, update_batches
from .composition import Projection
from .devices import capturing
from .experts import by_place, experts_of
from .geometry import Side
from .gradients import Checks, descent_gradient
from .moments import transport_moments
from .parts import gather_updates, project_parts, whole_first_moment
from .plan import EVERYTHING, Given, Plan
from .refresh import Refresh, RefreshHook, refresh_due
from .shared_refresh import SharedRefreshes
from .together import may_join, scratch_sizes, update_together
from .write import apply_update


def step_projected(
    plan: Plan,
    first: int,
    count: int,
    hooks: Sequence[RefreshHook],
    pending: MutableMapping[MatrixKey, PendingMoments],
    checks: Checks,
    shared: SharedRefreshes | None,
    given: Given = EVERYTHING,
) -> bool:
    """Takes the step of a projected group, after the refreshes that are due.

    Args:
        plan: the group.
        first: projected matrices before this group.
        count: projected matrices of all groups.
        hooks: called after each refresh.
        pending: moments to transport after changed options; those of this group's matrices are
            removed.
        checks: excludes gradients that are not finite.
        shared: refreshes that processes share, if they do.
        given: which parameters take it; none of them that has no gradient but its projection is due
            for a refresh.

    Returns:
        Whether any of them was due.
    """
    params, refitted = projected_params(plan, first, given), False
    if not capturing():
        refresh = Refresh(plan.composition, hooks, pending)
        if shared is not None and refresh.projection.projector.FITS_GRADIENT:
            shared.refresh_due(plan, params, count, refresh)
            refitted = True
        else:
            refitted = refresh_due(params, count, refresh)
        if pending:
            _start_anew(plan, given.chosen(plan), params, pending)
    _update(plan, params, checks)
    return refitted


def projected_params(plan: Plan, first: int, given: Given = EVERYTHING) -> list[ProjectedParam]:
    """A `ProjectedParam` for each matrix that has a gradient, or is given its projection."""
    rule = plan.composition.rule
    params: list[ProjectedParam] = []
    for i in given.chosen(plan):
        param, geometry, known = plan.params[i], plan.geometries[i], given.projected.get(i)
        grad = descent_gradient(param, plan.group) if known is None else known
        if grad is None:
            continue
        index = first + plan.places[i]
        assert geometry is not None
        if plan.by_expert(i):
            params += [
                ProjectedParam(
                    *(own.weight, own.grad, own.state, geometry, own.rows, index + own.expert),
                    steps_done=0,
                    seed_name=own.seed_name,
                    name=own.name,
                    param=param,
                    expert=own.expert,
                    first_moment=partial(rule.first_moment, own.state),
                )
                for own in experts_of(plan, i, grad)
            ]
            continue
        own = plan.local_state(i)
        params.append(
            ProjectedParam(
                weight=plan.shards[i].local(param),
                grad=plan.shards[i].as_rows(grad) if known is None else known,
                state=own,
                geometry=geometry,
                rows=plan.shards[i].rows,
                index=index,
                steps_done=0,
                seed_name=plan.seed_names[i],
                name=plan.names[i],
                param=param,
                first_moment=partial(whole_first_moment, rule, own),
                projected=known,
            )
        )
    if not capturing():
        for held, steps in zip(params, read_steps([p.state for p in params]), strict=True):
            held.steps_done = steps
    assert plan.composition.projection is not None
    plan.composition.projection.residual.prepare(params)
    return params


def _start_anew(
    plan: Plan,
    positions: Sequence[int],
    params: Sequence[ProjectedParam],
    pending: MutableMapping[MatrixKey, PendingMoments],
) -> None:
    """Resets the step count of matrices whose pending moments got no new basis in this step."""
    anew: set[MatrixKey] = set()
    for i in positions:
        param, state = plan.params[i], plan.states[i]
        if pending.pop(param, None) is not None:
            state["step"].zero_()
            anew.add(param)
        for place, count in by_place(param, state["step"]) if state and plan.by_expert(i) else ():
            if pending.pop((param, place), None) is not None:
                count.zero_()
                anew.add((param, place))
    for held in params:
        if held.key in anew:
            held.state["step"].zero_()  # may be a copy, see `Plan.host_steps`
            held.steps_done = 0


def _update(plan: Plan, params: Sequence[ProjectedParam], checks: Checks) -> None:
    """Updates moments and weights, in batches of bounded scratch."""
    projection, rule = plan.composition.projection, plan.composition.rule
    assert projection is not None
    weights, states = [param.weight for param in params], [param.state for param in params]
    steps = [param.steps_done for param in params]
    sizes = scratch_sizes(params, projection, rule)
    spread = [param.rows.processes for param in params]
    shapes = [param.geometry for param in params]
    for indices in update_batches(weights, states, steps, sizes, plan.group, spread, shapes):
        batch = [params[i] for i in indices]
        if plan.group["capturable"]:
            _draw_noise(batch, projection)
        if may_join(batch[0]):
            _update_joined(batch, projection, rule, checks)
            continue
        gradients = project_parts(batch, projection.projector)
        # A non-finite gradient always has a non-finite projection, which is cheaper to check.
        kept = checks.usable(
            gradients,
            [param.owner for param in batch],
            [param.name for param in batch],
            [param.rows.processes for param in batch],
        )
        pairs = [(batch[i], gradients[i]) for i in kept]
        if pairs:
            _update_batch([p for p, _ in pairs], [g for _, g in pairs], projection, rule)


def _draw_noise(batch: Sequence[ProjectedParam], projection: Projection) -> None:
    """Seeds of roundings by step counts on the device: a replayed step has its own noise."""
    options = projection.options
    found = [p for p in batch if rounds(p.weight, stochastic=options.stochastic_rounding)]
    if not found:
        return
    noise = rounding_seeds(
        [param.weight for param in found],
        options.seed,
        [param.seed_name for param in found],
        [param.state["step"] for param in found],
    )
    for param, own in zip(found, noise, strict=True):
        param.noise = own


def _update_joined(
    batch: Sequence[ProjectedParam], projection: Projection, rule: UpdateRule, checks: Checks
) -> None:
    """Updates matrices of one geometry together, see `together`."""
    projected_b = projection.projector.project_together(batch)
    owners, called = [param.owner for param in batch], [param.name for param in batch]
    good_b: Tensor | None = None
    if checks.on and _gates(projection):
        good_b = checks.skipped.gate(projected_b, owners, called)
        for param, good in zip(batch, good_b.unbind(0), strict=True):
            param.good = good
    elif checks.on and checks.reads:
        kept = checks.skipped.usable_together(projected_b, owners, called)
        if not kept:
            return
        if len(kept) < len(batch):
            batch = [batch[i] for i in kept]
            projected_b = torch.stack([projected_b[i] for i in kept])
    update_together(batch, projected_b, projection, rule, good_b)
    if projection.options.moments == "keep":
        projection.projector.track_together(batch, projected_b, good_b)
    elif projection.projector.TRACKS:
        for param, projected in zip(batch, projected_b.unbind(0), strict=True):
            _track(param, projected, projection, rule)
    for param in batch:
        param.read = None


def _gates(projection: Projection) -> bool:
    """Whether all that follows a projection heeds flags on the device, so that none is read."""
    return projection.projector.gates and projection.residual.GATES


def _update_batch(
    batch: Sequence[ProjectedParam],
    gradients: Sequence[Tensor],
    projection: Projection,
    rule: UpdateRule,
) -> None:
    torch._foreach_add_([param.state["step"] for param in batch], 1)
    states, weights = [param.state for param in batch], [param.weight for param in batch]
    if projection.residual.NORMS:
        axes = [0 if param.geometry.side is Side.LEFT else 1 for param in batch]
        updates = rule.update_with_norms(gradients, states, weights, axes)
    else:
        updates = rule.update(gradients, states, weights)
    projector = projection.projector
    whole = gather_updates(batch, gradients, updates, projection)
    for param, (projected, update) in zip(batch, whole, strict=True):
        written = projection.residual.compute_update(param, projected, update, projector)
        apply_update(written, param, projection)
        if projector.TRACKS:
            _track(param, projected, projection, rule)
        param.read = None


def _track(
    param: ProjectedParam, projected: Tensor, projection: Projection, rule: UpdateRule
) -> None:
    how = projection.options.moments
    previous = () if how == "keep" else tuple(b.clone() for b in projection.projector.bases(param))
    projection.projector.track(param, projected)
    param.read = None
    if previous:
        transport_moments(param, previous, projection, rule)
