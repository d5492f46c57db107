"""The update-rule interface: from a gradient (full or projected) to the update of a weight.

A rule is a frozen dataclass of hyper-parameters with pure functions on lists of tensors. It owns
the state keys that its `init` makes and never reads a basis: projected and plain parameters use the
same rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..engine.chunks import row_chunks
from ..engine.rotation import Rotation
from ..engine.sharding import Part
from .rows import BLOCK, state_rows
from .updates import State as State
from .updates import Update as Update
from .updates import add_update_, left_out, masked, together

#: How moments follow a change of their subspace: kept unchanged (GaLore), reset to zero with a
#: restarted bias correction (FRUGAL), transformed by the overlap of the bases (COAP's
#: `restore_state`), or rotated with the second moment as a variance (LDAdam).
MOMENT_TRANSPORTS = ("keep", "reset", "restore", "rotate")


class UpdateRule(ABC):
    """Moments of a gradient and the update they give."""

    #: Whether only matrices can be updated.
    matrices_only: ClassVar[bool] = False
    #: Scratch of `update`, as a multiple of the gradients in fp32.
    SCRATCH: ClassVar[int] = 1
    #: Which of `MOMENT_TRANSPORTS` it supports.
    transports: ClassVar[tuple[str, ...]] = ("keep",)

    def at_rate(self, lr: float | Tensor | None) -> Self:
        """The same rule with another learning rate; a rule that wraps another passes it on."""
        made: Any = replace(self, lr=lr)  # type: ignore[type-var]
        return made  # type: ignore[no-any-return]

    @abstractmethod
    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """State entries for a (projected) gradient of `shape`, for a parameter `like`."""

    @abstractmethod
    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes of these entries, for parameters of `itemsize` bytes an entry."""

    def part_bytes(self, part: Part, itemsize: int) -> int:
        """`state_bytes` of a part of a (projected) gradient that is spread over processes."""
        return self.deciding_for(part.shape).state_bytes(part.local_shape, itemsize)

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """Bytes that a process hands to collectives to update its part, see `lowrank.traffic`."""
        return 0

    def deciding_for(self, shape: Sequence[int]) -> Self:
        """The same rule with the decisions that it takes for a whole (projected) gradient.

        So each process stores its part in the same form.
        """
        return self

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """The dimension along which a state entry is spread over processes.

        Args:
            key: the entry.
            axis: the axis of the (projected) gradient that is spread.
            shape: of the whole (projected) gradient.

        Returns:
            None if all processes have the whole entry.
        """
        return axis

    def held(self, key: str, part: Part) -> int:
        """How many indices of a state entry's spread dimension belong to a part."""
        return part.stop - part.start

    def check_part(self, part: Part, called: str) -> None:  # noqa: B027 (optional)
        """Raises `ValueError` for a part of a gradient that this rule can't update.

        Args:
            part: which one.
            called: the parameter's name in messages.
        """

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """Computes what needs the whole matrix; the rest is computed by chunks of rows on demand.

        Args:
            grad: the descent gradient, m x n.
            state: its parameter's state; `step` already counts this step.
            weight: the parameter, read only.

        Returns:
            A function from a slice of rows to their update. Each row must be requested once; a
            slice begins at a multiple of `BLOCK` entries (`row_chunks`).
        """
        (whole,) = self.update([grad], [state], [weight])
        return lambda rows: replace(whole, direction=whole.direction[rows])

    def gated_rows(
        self, grad: Tensor, state: State, weight: Tensor, good: Tensor | None
    ) -> RowUpdates:
        """`by_rows` of a gradient that counts as zero, without direction, unless it is good.

        Args:
            grad: as in `by_rows`; it may hold NaN where the flag isn't set.
            state: as in `by_rows`.
            weight: as in `by_rows`.
            good: a flag on the device; None is set.
        """
        updates = self.by_rows(masked(grad, good), state, weight)
        return lambda rows: left_out(updates(rows), good)

    @abstractmethod
    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """Advances the moments in place and returns each weight's update.

        Args:
            grads: descent gradients or their projections, read only.
            states: each parameter's state; `step` already counts this step.
            weights: the parameters, read only (Adafactor scales by their RMS).
        """

    def update_with_norms(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> list[Update]:
        """`update`, with `norms` along each gradient's axis (0 or 1) where they cost nothing."""
        return self.update(grads, states, weights)

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """Bytes that `update_together` takes for an entry of a gradient, the gradient's included.

        Args:
            dtype: of the gradients.
            state: one of the states.
            overwrites: see `update_together`.
        """
        # Directions one by one, in a wide type, and all of them as one tensor.
        return dtype.itemsize + 2 * max(4, dtype.itemsize)

    def update_together(
        self,
        grads_b: Tensor,
        states: Sequence[State],
        weights: Sequence[Tensor],
        axis: int | None = None,
        good_b: Tensor | None = None,
        *,
        overwrites: bool = False,
    ) -> Update:
        """`update` of B gradients of one shape as one tensor, for GPUs.

        Args:
            grads_b: B x m x n, read only unless it `overwrites`.
            states: as in `update`, with equal step counts unless these are on the device.
            weights: as in `update`.
            axis: the axis of each gradient along which `norms` are wanted, 0 or 1; or None.
            good_b: B flags on the device: directions of the others are zero, as their gradients
                are; None for all.
            overwrites: nobody reads `grads_b` afterwards: what is computed may take its place.

        Returns:
            An update whose tensors have B as their first dimension (1 where it is the same for
            all); `norms` only where they cost nothing.
        """
        grads = list(grads_b.unbind(0))
        if axis is None:
            updates = self.update(grads, states, weights)
        else:
            updates = self.update_with_norms(grads, states, weights, [axis] * len(grads))
        update = together(updates)
        if good_b is not None:
            update.direction.mul_(good_b.view(-1, 1, 1))
        return update

    def bounds_scratch(self, weight: Tensor, state: State) -> bool:
        """Whether `apply` takes no scratch for such weights, or bounds it whatever their number."""
        return False

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """Updates plain weights in place; matrices in chunks of rows that bound the scratch.

        Args:
            grads: as in `update`.
            states: as in `update`.
            weights: changed in place.
            good_b: a flag on the device for each: other gradients, which may hold NaN, count as
                zero, and their weights only decay; None for all.
        """
        flags = [None] * len(weights) if good_b is None else good_b.unbind()
        for grad, state, weight, good in zip(grads, states, weights, flags, strict=True):
            if weight.dim() != 2:
                (update,) = self.update([masked(grad, good)], [state], [weight])
                add_update_(weight, left_out(update, good))
                continue
            updates = self.gated_rows(grad, state, weight, good)
            for rows in row_chunks(weight, block=BLOCK, entries=True):
                add_update_(weight[rows], updates(rows))

    def first_moment(self, state: State) -> Tensor | None:
        """The current first moment, dequantised; None if the rule has none."""
        moment: Tensor | None = state.get("exp_avg")
        return moment

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """Adapts the moments to a changed subspace.

        Args:
            state: of a parameter after `state["step"]` steps.
            how: one of `transports` but "keep".
            rotation: from old coordinates to new ones.
            into: the state to write, with moments of the new subspace's shapes; `state` itself
                when None.

        Raises:
            NotImplementedError: a rule lists `how` in `transports` without defining it; values
                that `transports` lacks are refused when the optimizer is made.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps its moments, not {how!r}")

    def carry(self, previous: UpdateRule, old: State, new: State) -> bool:
        """Carries moments over into a new state after a change of options, if they are compatible.

        Args:
            previous: the rule that made the old state.
            old: the parameter's old state, not used afterwards.
            new: the result of `init` for the same parameter; changed in place.

        Returns:
            False if moments and step count must be reset; `new` is invalid then.
        """
        if type(previous) is not type(self):
            return False
        known = new.keys() & old.keys()
        for key in known:
            value, previous_value = new[key], old[key]
            if isinstance(value, Tensor):
                if value.shape != previous_value.shape:
                    return False
                if value.dtype != previous_value.dtype:
                    if not (value.is_floating_point() and previous_value.is_floating_point()):
                        return False
                    previous_value = value.copy_(previous_value)
            new[key] = previous_value
        return bool(known) or not new


#: From a slice of a matrix's rows to their update.
RowUpdates = Callable[[slice], Update]


class ElementwiseRule(UpdateRule):
    """A rule in which an entry's update depends only on its own gradient and moments."""

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: everything is computed on demand."""

        def update(rows: slice) -> Update:
            (made,) = self.update([grad[rows]], [state_rows(state, rows, grad)], [weight])
            return made

        return update

    def gated_rows(
        self, grad: Tensor, state: State, weight: Tensor, good: Tensor | None
    ) -> RowUpdates:
        """See `UpdateRule.gated_rows`: no more than the rows asked for is copied."""

        def update(rows: slice) -> Update:
            own = state_rows(state, rows, grad)
            (made,) = self.update([masked(grad[rows], good)], [own], [weight])
            return left_out(made, good)

        return update


class TwoPassRule(UpdateRule):
    """A rule that first reads a whole matrix, in `by_rows`, and then makes updates of its rows."""

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        whole = zip(grads, states, weights, strict=True)
        return [self.by_rows(*given)(slice(0, len(given[0]))) for given in whole]


def steps_done(state: State, restarts: bool) -> int:
    """Steps that the moments average: all, or with `restarts` those since the last refresh."""
    steps = int(state["step"])
    return steps - max(int(state.get("refreshed_at", 0)), 0) if restarts else steps


def numel(shape: Sequence[int]) -> int:
    """Number of entries of a tensor of `shape`."""
    return torch.Size(shape).numel()


def scalar(value: float | Tensor) -> float:
    """A learning rate as a float; one on a device is read back."""
    return float(value)
