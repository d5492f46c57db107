"""One step of a group's projected matrices: refresh what is due, project, update, write back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..projectors import ProjectedParam
from ..rules import UpdateRule
from .batching import refresh_batches, update_batches
from .composition import Composition, Projection
from .geometry import RowRange, Side
from .gradients import descent_gradient, label, names
from .moments import transport_moments
from .options import Group
from .refresh import RefreshHook, refresh
from .write import apply_update

#: Positions of the tensors to go on with, given tensors and what to call each.
Finite = Callable[[Sequence[Tensor], Callable[[int], str]], list[int]]


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def projected_params(
    group: Group,
    composition: Composition,
    state: dict[Tensor, dict[str, Any]],
    first: int,
    seed_names: Sequence[str],
) -> list[ProjectedParam]:
    """A `ProjectedParam` for each parameter that has a gradient.

    Args:
        group: a group with a projection.
        composition: what its options mean.
        state: the optimizer's state.
        first: projected matrices before this group.
        seed_names: what the parameters' draws are made from.
    """
    assert composition.projection is not None
    params = []
    for offset, (param, name) in enumerate(zip(group["params"], names(group), strict=True)):
        grad = descent_gradient(param, name, group)
        if grad is not None:
            own = state[param]
            params.append(
                ProjectedParam(
                    weight=param,
                    grad=grad,
                    state=own,
                    geometry=composition.projection.geometry(param.shape),
                    rows=RowRange.whole(param.shape[0]),
                    index=first + offset,
                    steps_done=0 if capturing() else int(own["step"]),
                    seed_name=seed_names[offset],
                    name=name,
                    first_moment=partial(composition.rule.first_moment, own),
                )
            )
    return params


def refresh_due(
    params: Sequence[ProjectedParam],
    composition: Composition,
    count: int,
    hooks: Sequence[RefreshHook],
) -> None:
    """Refits the bases of the matrices whose turn it is, of `count` in all."""
    projection = composition.projection
    assert projection is not None
    due = [
        param
        for param in params
        if projection.schedule.due(param.state, param.steps_done, param.index, count)
    ]
    for batch in refresh_batches(due):
        refresh(batch, composition, hooks)


def step_projected(
    group: Group, composition: Composition, params: Sequence[ProjectedParam], finite: Finite
) -> None:
    """Takes the step of these matrices, in batches of bounded scratch."""
    projection = composition.projection
    assert projection is not None
    states = {param.weight: param.state for param in params}
    for indices in update_batches([param.weight for param in params], states, group):
        batch = [params[i] for i in indices]
        gradients = [projection.projector.project(param) for param in batch]
        # A non-finite gradient always shows in its projection, which is smaller to read.
        called = [label(param.name, param.weight) for param in batch]
        kept = finite(gradients, called.__getitem__)
        batch, gradients = [batch[i] for i in kept], [gradients[i] for i in kept]
        if not batch:
            continue
        torch._foreach_add_([param.state["step"] for param in batch], 1)
        states_of_batch = [param.state for param in batch]
        weights = [param.weight for param in batch]
        if projection.residual.NORMS:
            axes = [0 if param.geometry.side is Side.LEFT else 1 for param in batch]
            updates = composition.rule.update_with_norms(gradients, states_of_batch, weights, axes)
        else:
            updates = composition.rule.update(gradients, states_of_batch, weights)
        for param, projected, update in zip(batch, gradients, updates, strict=True):
            write = projection.residual.compute_update(
                param, projected, update, projection.projector
            )
            apply_update(write, param, projection)
            if projection.projector.TRACKS:
                _track(param, projected, projection, composition.rule)
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
