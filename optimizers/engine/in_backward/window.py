"""What is known between the first backward pass of a step and its `step()`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunks import wide_dtype
from ..low_rank_gradients import Place
from ..options import Group
from ..plan import Plan
from .norm import Length


class Sum(NamedTuple):
    """Of projected gradients.

    Attributes:
        param: the parameter.
        projected: the sum, in fp32 or fp64; this process's part.
        maximize: whether the gradients were negated.
    """

    param: Tensor
    projected: Tensor
    maximize: bool

    def in_dtype(self) -> Tensor:
        """The sum in the precision of the parameter, as a gradient has it."""
        return self.projected.to(self.param.dtype)


class Whole(NamedTuple):
    """A gradient that is kept in `.grad`: the tensor, and its version when a hook saw it last."""

    param: Tensor
    gradient: Tensor
    version: int

    def unchanged(self) -> bool:
        """Whether nobody has replaced or changed it since."""
        return self.param.grad is self.gradient and self.gradient._version == self.version


@dataclass
class Window:
    """One step's backward passes; parameters by their ids.

    Attributes:
        passes: begun so far.
        task: the autograd engine's number of the last one, -1 before the first.
        open: whether it has not ended yet.
        places: the matrices whose projected gradients are enough.
        sums: projected gradients so far.
        whole: gradients that are kept as they are.
        norms: of whole gradients, as far as clipping needs them, with all uses before this one.
        updated: parameters whose step has been taken, by id.
        rates: what the learning rates were when the first one was.
        scaled: whether what is left has been clipped.
    """

    passes: int = 0
    task: int = -1
    open: bool = False
    places: dict[int, Place] = field(default_factory=dict)
    sums: dict[int, Sum] = field(default_factory=dict)
    whole: dict[int, Whole] = field(default_factory=dict)
    norms: dict[int, Length] = field(default_factory=dict)
    updated: dict[int, Tensor] = field(default_factory=dict)
    rates: list[tuple[Plan, Any]] = field(default_factory=list)
    scaled: bool = False

    def add(self, param: Tensor, projected: Tensor, group: Group, *, alone: bool) -> None:
        """Adds a projected gradient to the parameter's sum; `alone` if none will follow."""
        known = self.sums.get(id(param))
        if known is not None:
            known.projected.add_(projected)
            return
        if not alone:
            projected = projected.to(wide_dtype(projected))
        self.sums[id(param)] = Sum(param, projected, bool(group["maximize"]))

    def keep(self, param: Tensor) -> None:
        """Records the gradient that is in `.grad`."""
        assert param.grad is not None
        self.whole[id(param)] = Whole(param, param.grad, param.grad._version)

    def record_rates(self, plans: list[Plan]) -> None:
        """Remembers the learning rates that updates are made with."""
        self.rates = [(plan, _copied(plan.group["lr"])) for plan in plans]

    def changed_groups(self) -> Iterator[Group]:
        """Groups whose options were changed since the first update."""
        for plan, rate in self.rates:
            now = plan.group["lr"]
            same = (
                torch.equal(now, rate)
                if isinstance(rate, Tensor) and isinstance(now, Tensor)
                else (now == rate)
            )
            if not same or not plan.snapshot.holds(plan.group):
                yield plan.group


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate
