"""Gradients that travel between processes as their projections, where nothing is lost by it.

A method that drops what is outside the subspace reads a gradient G only through its projection,
say R = P^T G, which is linear. So the projection of the mean over processes is the mean of their
projections, and r x n numbers need to travel instead of m x n. What becomes of the gradient is

    P (P^T P)^-1 mean(R),

the mean gradient's orthogonal projection to the subspace, of which every further projection is the
mean of R again. P^T P is the identity for bases that are orthonormal in the gradient's precision;
for others (four and eight bits, COAP's, Gaussian ones) its inverse is computed.

Other methods need the gradient itself, and so does a refit: `why_whole` says why, `places` leaves
out the matrices that are due.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..projectors import ProjectedParam, Projector
from .batching import read_steps
from .chunks import wide_dtype
from .composition import Composition
from .fp32 import exact_fp32
from .geometry import Geometry, RowRange
from .options import Group
from .plan import SCALARS, Plan, numbered

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer

#: See `_inverse`.
SHIFT, NEWTON_STEPS = 1e-4, 3


@dataclass(frozen=True)
class Place:
    """A matrix whose gradient may travel as its projection in the next step.

    Attributes:
        plan: its group.
        position: in the group.
        index: among the optimizer's projected matrices.
        steps_done: steps taken so far.
        state: its state.
    """

    plan: Plan
    position: int
    index: int
    steps_done: int
    state: dict[str, Any]

    @property
    def projector(self) -> Projector:
        """The group's projector, with products in the gradient's own precision."""
        assert self.plan.core.projection is not None
        return replace(self.plan.core.projection.projector, dtype=None)

    @property
    def geometry(self) -> Geometry:
        """Of the matrix."""
        geometry = self.plan.geometries[self.position]
        assert geometry is not None
        return geometry

    def entries(self) -> int:
        """Entries of the projected gradient."""
        return math.prod(self.geometry.projected_shape())

    def project(self, grad: Tensor) -> Tensor:
        """The projected gradient, in the gradient's precision."""
        return self.projector.project(self._of(grad))

    def expand(self, projected: Tensor, into: Tensor) -> None:
        """In place: fills the gradient `into` with the one in the subspace that projects to this.

        Args:
            projected: flat.
            into: of the matrix's shape; its values are lost.
        """
        projector, param = self.projector, self._of(into.zero_())
        own = projected.view(self.geometry.projected_shape())
        own = _coordinates(projector, param, own)
        projector.write_back(param, into, param.rows, own, alpha=-1.0, decay_factor=1.0)

    def _of(self, grad: Tensor) -> ProjectedParam:
        weight = self.plan.params[self.position]
        return ProjectedParam(
            weight=weight,
            grad=grad,
            state=self.state,
            geometry=self.geometry,
            rows=RowRange.whole(weight.shape[0]),
            index=self.index,
            steps_done=self.steps_done,
            seed_name=self.plan.seed_names[self.position],
        )


def why_whole(
    composition: Composition, group: Group, param: Tensor, geometry: Geometry | None
) -> str | None:
    """Why a parameter's gradient always travels whole; None if its projection is enough.

    Args:
        composition: of the parameter's group.
        group: its options.
        param: the parameter.
        geometry: its, if it is projected and not empty.
    """
    projection = composition.projection
    if projection is None:
        return "it is not projected"
    if projection.residual.READS_GRADIENT:
        return f"residual={group['residual']!r} uses the gradient outside the subspace"
    if projection.projector.TRACKS:
        return f"projector={group['projector']!r} moves the basis by the gradient at every step"
    if group["capturable"]:
        return "capturable=True keeps the step count on the device"
    if geometry is None:
        return "it is empty"
    if composition.by_expert(param.shape):
        return "it holds several experts"
    projected = math.prod(geometry.projected_shape())
    if projected >= param.numel():
        return f"its projection has {projected} entries, it has {param.numel()}"
    return None


def examine(optimizer: LowRankOptimizer) -> dict[int, int | str]:
    """By parameter id: the entries of its projected gradient, or why it always travels whole."""
    found: dict[int, int | str] = {}
    for group in optimizer.param_groups:
        plan = optimizer._plan_of(group)
        core = optimizer.compose(group) if plan is None else plan.core
        for param in group["params"]:
            geometry = None
            if core.projection is not None and param.numel():
                geometry = core.projection.geometry(param.shape)
            reason = why_whole(core, group, param, geometry)
            if reason is None:
                assert geometry is not None
                found[id(param)] = math.prod(geometry.projected_shape())
            else:
                found[id(param)] = reason
    return found


def places(optimizer: LowRankOptimizer) -> dict[int, Place]:
    """The matrices whose projected gradients are enough for the next step, by parameter id.

    None of them is due for a refit. Nothing at all where options or state were changed since the
    last step in a way that may call for one: the next step finds that out. Reads host memory only,
    and changes nothing.
    """
    plans = [optimizer._plan_of(group) for group in optimizer.param_groups]
    known = [plan for plan in plans if plan is not None and _steady(plan, optimizer.state)]
    try:
        if len(known) < len(plans):
            return {}
        return places_in(known, optimizer)
    finally:
        for plan in known:
            plan.release()


def _steady(plan: Plan, state: Mapping[Tensor, dict[str, Any]]) -> bool:
    """Whether the next step keeps all of a group's bases, but for those that are due."""
    snapshot = plan.snapshot
    if not snapshot.holds(plan.group) and not snapshot.changed(plan.group) <= SCALARS:
        return False
    settled = plan.settled(state)
    if not settled:
        plan.release()
    return settled


def places_in(plans: Sequence[Plan], optimizer: LowRankOptimizer) -> dict[int, Place]:
    """`places`, by plans whose states are at hand."""
    found: dict[int, Place] = {}
    firsts, count = numbered(plans)
    for plan, first in zip(plans, firsts, strict=True):
        found |= places_of(plan, first, count, range(len(plan.params)), optimizer)
    return found


def places_of(
    plan: Plan, first: int, count: int, positions: Sequence[int], optimizer: LowRankOptimizer
) -> dict[int, Place]:
    """`places` of some parameters of a group, by parameter id.

    Args:
        plan: the group, its states at hand.
        first: projected matrices before the group.
        count: projected matrices of all groups.
        positions: of the parameters.
        optimizer: which has the group.
    """
    eligible = [
        i
        for i in positions
        if why_whole(plan.core, plan.group, plan.params[i], plan.geometries[i]) is None
        and plan.params[i] not in optimizer._pending_moments
    ]
    projection = plan.core.projection
    if projection is None or not eligible:
        return {}
    found: dict[int, Place] = {}
    steps = read_steps([plan.states[i] for i in eligible])
    for i, steps_done in zip(eligible, steps, strict=True):
        state, index = plan.states[i], first + plan.places[i]
        if not projection.schedule.due(state, steps_done, index, count):
            found[id(plan.params[i])] = Place(plan, i, index, steps_done, state)
    return found


def _coordinates(projector: Projector, param: ProjectedParam, projected: Tensor) -> Tensor:
    """(P^T P)^-1 R, or R itself where the basis is orthonormal."""
    bases = projector.bases(param)
    precisions = [torch.finfo(tensor.dtype).eps for tensor in (bases[0], projected)]
    if projector.orthonormal and projector.storage.exact and precisions[0] <= precisions[1]:
        return projected
    wide = wide_dtype(projected)
    param.read = tuple(basis.to(wide) for basis in bases)
    with exact_fp32():
        gram = projector.rotation(param, param.read)
        inverse = replace(gram, left=_inverse(gram.left), right=_inverse(gram.right))
        own = inverse(projected.to(wide))
    param.read = bases
    return own


def _inverse(gram_rr: Tensor | None) -> Tensor | None:
    """The inverse of a symmetric matrix, without host synchronisation.

    Of one that is shifted by `SHIFT` of its largest entry, so that the Cholesky factorisation never
    fails. Newton steps then take the shift's relative error e to e^8; along directions that the
    bases lack the inverse stays bounded.
    """
    if gram_rr is None:
        return None
    diagonal = gram_rr.diagonal()
    shift = diagonal.amax() * max(SHIFT, len(gram_rr) * torch.finfo(gram_rr.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(gram_rr + torch.diag(shift.expand_as(diagonal)))
    inverse: Tensor = torch.cholesky_inverse(factor)
    for _ in range(NEWTON_STEPS):
        inverse = 2.0 * inverse - inverse @ gram_rr @ inverse
    return inverse
