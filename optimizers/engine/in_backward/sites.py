"""Where parameters are among an optimizer's groups, for hooks that have one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..geometry import Side
from ..low_rank_gradients import why_whole
from ..options import Group
from ..parameters import label
from ..parts import project_parts
from ..plan import Given, Plan, numbered
from ..refresh import Refresh, RefreshHook, refresh_due
from ..step import projected_params
from .norm import Length, norm_of


class Site(NamedTuple):
    """A parameter's place.

    Attributes:
        plan: its group's, with the states at hand.
        position: in the group.
        first: projected matrices before the group.
        of: number of projected matrices of all groups.
    """

    plan: Plan
    position: int
    first: int
    of: int

    @property
    def param(self) -> Tensor:
        """The parameter."""
        return self.plan.params[self.position]

    @property
    def group(self) -> Group:
        """Its group."""
        return self.plan.group

    @property
    def name(self) -> str | None:
        """Its name, if it has one."""
        return self.plan.names[self.position]

    def label(self) -> str:
        """Its name in messages."""
        return label(self.name, self.param)

    def project(self) -> Tensor:
        """This process's part of the projected gradient, of the one that is descended along."""
        (own,) = projected_params(self.plan, self.first, Given((self.position,)))
        assert self.plan.composition.projection is not None
        return project_parts([own], self.plan.composition.projection.projector)[0]

    def why_whole(self) -> str | None:
        """Why the gradient itself is always needed; None if its projection is enough."""
        geometry = self.plan.geometries[self.position]
        return why_whole(self.plan.core, self.group, self.param, geometry)

    def refit(self, hooks: Sequence[RefreshHook]) -> None:
        """Refits the bases to the gradient that is there, if they are due."""
        params = projected_params(self.plan, self.first, Given((self.position,)))
        refresh_due(params, self.of, Refresh(self.plan.composition, hooks, {}))

    def length(self, gradient: Tensor, *, whole: bool) -> Length:
        """The norm of the gradient, or else of its projection."""
        geometry = self.plan.geometries[self.position]
        if not whole and geometry is not None and geometry.side is Side.BOTH:
            return Length(norm_of(gradient))  # all of it is here
        return Length(norm_of(gradient), self.plan.shards[self.position].rows.processes)


def sites_of(plans: Sequence[Plan]) -> dict[int, Site]:
    """By parameter id."""
    firsts, count = numbered(plans)
    return {
        id(param): Site(plan, position, first, count)
        for plan, first in zip(plans, firsts, strict=True)
        for position, param in enumerate(plan.params)
    }
