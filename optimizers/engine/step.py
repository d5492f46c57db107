"""One step of a group: refresh, project, update, write back; or a full-rank update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..projectors import ProjectedParam
from ..rules import UpdateRule
from ..weights import apply_rule
from .adapt import PendingMoments
from .batching import read_steps, update_batches
from .composition import Projection
from .geometry import Side
from .gradients import descent_gradient
from .moments import transport_moments
from .parts import gather_update, project_part, whole_first_moment
from .plan import Plan
from .processes import Processes
from .refresh import Refresh, RefreshHook, refresh_due
from .sharding import local_part
from .shared_refresh import SharedRefreshes
from .write import apply_update

#: Positions of the tensors to use, given tensors, their parameters and names, and the processes
#: that have other parts of them.
Usable = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[str | None], Sequence[Processes]], Iterable[int]
]


def capturing() -> bool:
    """Whether a CUDA graph is being captured, during which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def step_plain(plan: Plan, usable: Usable) -> None:
    """Takes the step of a group without projection.

    Args:
        plan: the group.
        usable: excludes gradients that are not finite.
    """
    group = plan.group
    grads = [descent_gradient(param, group) for param in plan.params]
    found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
    kept = usable(
        [grad for _, grad in found],
        [plan.params[i] for i, _ in found],
        [plan.names[i] for i, _ in found],
        [plan.shards[i].rows.processes for i, _ in found],
    )
    chosen = [found[position] for position in kept]
    params = [local_part(plan.params[i].detach()) for i, _ in chosen]
    states = [plan.local_state(i) for i, _ in chosen]
    # Captured steps are not grouped by step count, which would have to be read back.
    steps = [0] * len(states) if group["capturable"] else read_steps(states)
    entries = [plan.params[i].numel() for i, _ in chosen]
    for batch in update_batches(params, states, steps, entries, group):
        own = [states[position] for position in batch]
        torch._foreach_add_([state["step"] for state in own], 1)
        apply_rule(
            plan.composition.rule,
            [chosen[position][1] for position in batch],
            own,
            [params[position] for position in batch],
            group.get("seed", 0),
            [plan.seed_names[chosen[position][0]] for position in batch],
            stochastic=group.get("stochastic_rounding", False),
        )


def step_projected(
    plan: Plan,
    first: int,
    count: int,
    hooks: Sequence[RefreshHook],
    pending: MutableMapping[Tensor, PendingMoments],
    usable: Usable,
    shared: SharedRefreshes | None,
) -> None:
    """Takes the step of a projected group, after the refreshes that are due.

    Args:
        plan: the group.
        first: projected matrices before this group.
        count: projected matrices of all groups.
        hooks: called after each refresh.
        pending: moments to transport after changed options; those of this group's matrices are
            removed.
        usable: excludes gradients that are not finite.
        shared: refreshes that processes share, if they do.
    """
    params = projected_params(plan, first)
    if not capturing():
        refresh = Refresh(plan.composition, hooks, pending)
        if shared is not None and refresh.projection.projector.FITS_GRADIENT:
            shared.refresh_due(plan, params, count, refresh)
        else:
            refresh_due(params, count, refresh)
        if pending:
            _start_anew(plan, params, pending)
    _update(plan, params, usable)


def projected_params(plan: Plan, first: int) -> list[ProjectedParam]:
    """A `ProjectedParam` for each parameter that has a gradient."""
    group, rule = plan.group, plan.composition.rule
    grads = [descent_gradient(param, group) for param in plan.params]
    held = [i for i, grad in enumerate(grads) if grad is not None]
    steps = [0] * len(held) if capturing() else read_steps([plan.states[i] for i in held])
    params = []
    for i, steps_done in zip(held, steps, strict=True):
        param, grad, geometry = plan.params[i], grads[i], plan.geometries[i]
        own = plan.local_state(i)
        assert grad is not None
        assert geometry is not None
        params.append(
            ProjectedParam(
                weight=local_part(param),
                grad=grad,
                state=own,
                geometry=geometry,
                rows=plan.shards[i].rows,
                index=first + i,
                steps_done=steps_done,
                seed_name=plan.seed_names[i],
                name=plan.names[i],
                param=param,
                first_moment=partial(whole_first_moment, rule, own),
            )
        )
    return params


def _start_anew(
    plan: Plan, params: Sequence[ProjectedParam], pending: MutableMapping[Tensor, PendingMoments]
) -> None:
    """Resets the step count of matrices whose pending moments got no new basis in this step."""
    for param, state in zip(plan.params, plan.states, strict=True):
        if pending.pop(param, None) is not None:
            state["step"].zero_()
    for held in params:
        if int(held.state["step"]) == 0:
            held.steps_done = 0


def _update(plan: Plan, params: Sequence[ProjectedParam], usable: Usable) -> None:
    """Updates moments and weights, in batches of bounded scratch."""
    projection, rule = plan.composition.projection, plan.composition.rule
    assert projection is not None
    weights, states = [param.weight for param in params], [param.state for param in params]
    steps = [param.steps_done for param in params]
    entries = [math.prod(param.geometry.projected_shape()) for param in params]
    for indices in update_batches(weights, states, steps, entries, plan.group):
        batch = [params[i] for i in indices]
        gradients = [project_part(param, projection.projector) for param in batch]
        # A non-finite gradient always has a non-finite projection, which is cheaper to check.
        kept = usable(
            gradients,
            [param.owner for param in batch],
            [param.name for param in batch],
            [param.rows.processes for param in batch],
        )
        pairs = [(batch[i], gradients[i]) for i in kept]
        if pairs:
            _update_batch([p for p, _ in pairs], [g for _, g in pairs], projection, rule)


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
    for param, part, made in zip(batch, gradients, updates, strict=True):
        projector = projection.projector
        projected, update = gather_update(param, part, made, projection)
        written = projection.residual.compute_update(param, projected, update, projector)
        apply_update(written, param, projection)
        if projection.projector.TRACKS:
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
