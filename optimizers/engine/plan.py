"""A group's composition, cached until one of its options changes.

Composing a group takes far longer than checking whether an option was changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import is_, itemgetter

import torch
from torch import Tensor

from ..rules.base import State
from . import checks
from .composition import Composition
from .experts import copied_to_host
from .geometry import Geometry
from .options import NO_OPTIONS, Group, check_lr
from .parameters import names
from .sharding import local_part, shard_of

#: Options that affect neither the entries of a state nor their meaning.
SCALARS = frozenset(
    (
        *("betas", "eps", "weight_decay", "momentum", "nesterov", "clip_threshold", "decay_rate"),
        *("maximize", "foreach", "fused", "compile", "skip_nonfinite"),
    )
)
_NOTHING: State = {}


class Snapshot:
    """A copy of a group's options, to detect changes.

    Attributes:
        options: values by name.
        dtypes: the parameters' dtypes by their ids.
    """

    def __init__(self, group: Group) -> None:
        self.options = {
            # A list may be changed in place.
            key: list(value) if isinstance(value, list) else value
            for key, value in group.items()
            if key not in NO_OPTIONS
        }
        self._values, self._size = tuple(self.options.values()), len(group)
        self._types = tuple(map(type, self._values))
        self._read = itemgetter(*self.options)
        self.dtypes = {id(param): param.dtype for param in group["params"]}

    def holds(self, group: Group) -> bool:
        """Whether all options are unchanged; may return False although they are."""
        if len(group) != self._size:
            return False
        try:
            values = self._read(group)
            return tuple(map(type, values)) == self._types and bool(values == self._values)
        except (KeyError, RuntimeError, ValueError):  # a missing key; tensors of several entries
            return False

    def changed(self, group: Group) -> set[str]:
        """Names of options that were changed, added or removed."""
        now = {key: value for key, value in group.items() if key not in NO_OPTIONS}
        return {
            key
            for key in now.keys() | self.options.keys()
            if key not in now
            or key not in self.options
            or not checks.same(now[key], self.options[key])
        }


class Plan:
    """A group, its composition, and the parameters whose state was checked against it.

    Attributes:
        group: the group itself.
        snapshot: its options.
        core: their composition, up to the learning rate.
        composition: the same with the learning rate of this step.
        params: the parameters.
        states: their states during a step, empty for a parameter without entries. Between steps
            there are none, so that state that is cleared leaves the memory.
        seed_names: the names that seed the parameters' random numbers, see `seeds`.
        shards: the parts of the parameters that are here.
        geometries: of the parameters, or of each of their experts, if the group is projected.
        places: the place of each parameter's first matrix among the group's.
        matrices: number of matrices, each expert being one.
    """

    def __init__(
        self,
        group: Group,
        core: Composition,
        state: Mapping[Tensor, State],
        snapshot: Snapshot,
        seed_names: Sequence[str],
    ) -> None:
        """Records a group and the state that was checked against it."""
        self.group, self.core, self.snapshot = group, core, snapshot
        self.composition, self._lr = core, group["lr"]
        self.params: list[Tensor] = list(group["params"])
        self.states: list[State] = []
        self._copied_steps: list[tuple[Tensor, Tensor]] = []
        states = [state.get(param, _NOTHING) for param in self.params]
        # A state is known by its step count, a tensor that a state keeps for good.
        self._counts, self._sizes = _counts(states), list(map(len, states))
        self._kinds = _kinds(self.params)
        self.names: Sequence[str | None] = list(names(group))
        self.seed_names = seed_names
        pairs = zip(self.params, self.names, strict=True)
        self.shards = [shard_of(param, name) for param, name in pairs]
        counts = [p.shape[0] if core.by_expert(p.shape) else 1 for p in self.params]
        self.places, self.matrices = [0, *accumulate(counts)][:-1], sum(counts)
        self.geometries: list[Geometry | None] = [None] * len(self.params)
        if core.projection is not None:
            self.geometries = [
                own.seen(core.projection.geometry(param.shape)) if param.numel() else None
                for param, own in zip(self.params, self.shards, strict=True)
            ]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The parameters' dtypes when their state was checked."""
        return [dtype for _, dtype, _ in self._kinds]

    def current(self) -> bool:
        """Whether the options are unchanged since they were composed."""
        return self.snapshot.holds(self.group) and (self.group["lr"] is None) == (self._lr is None)

    def settled(self, state: Mapping[Tensor, State]) -> bool:
        """Whether parameters and state are unchanged since they were checked; sets `states`."""
        params = self.group["params"]
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        self.states = [state.get(param, _NOTHING) for param in self.params]
        return (
            all(map(is_, _counts(self.states), self._counts))
            and list(map(len, self.states)) == self._sizes
            and _kinds(self.params) == self._kinds
        )

    def local_state(self, position: int) -> State:
        """A parameter's state as a step sees it, see `LocalState`."""
        shard, geometry = self.shards[position], self.geometries[position]
        return shard.local_state(self.states[position], geometry)

    def by_expert(self, position: int) -> bool:
        """Whether a parameter is trained as E matrices, see `experts`."""
        return self.core.by_expert(self.params[position].shape)

    def host_steps(self, position: int) -> Tensor:
        """Step counts of a parameter's experts, on the host, where rules read each of them.

        `write_steps` writes copies back.
        """
        steps: Tensor = local_part(self.states[position]["step"])
        if not copied_to_host(steps, capturable=self.group["capturable"]):
            return steps
        copy = steps.to("cpu", copy=True)
        self._copied_steps.append((steps, copy))
        return copy

    def write_steps(self) -> None:
        """Writes copies of step counts back, see `host_steps`."""
        for steps, copy in self._copied_steps:
            steps.copy_(copy)
        self._copied_steps = []

    def release(self) -> None:
        """Ends a step: the states are the optimizer's alone again."""
        self.write_steps()
        self.states = []

    def read_rate(self) -> None:
        """Updates `composition` with the group's current learning rate.

        Raises:
            ValueError: the learning rate is not accepted.
        """
        lr = self.group["lr"]
        if lr is self._lr and not (self.core.reads_rate and isinstance(lr, Tensor)):
            return  # the rule holds the tensor itself, which may change in place
        if not isinstance(lr, Tensor):
            lr = checks.plain(lr)
            self.group["lr"] = lr
        if lr is not None:
            check_lr(lr)
        self.composition, self._lr = self.core.at_rate(self.group), lr


@dataclass(frozen=True)
class Given:
    """What of a group takes a step.

    Attributes:
        positions: of the parameters that do; None for all that have a gradient.
        projected: by position, this process's part of the (descent) gradient's projection, where it
            is known and the gradient itself isn't (`update_in_backward`).
    """

    positions: Sequence[int] | None = None
    projected: Mapping[int, Tensor] = field(default_factory=dict)

    def chosen(self, plan: Plan) -> Sequence[int]:
        """Positions in the group."""
        return range(len(plan.params)) if self.positions is None else self.positions


#: A step of all parameters that have a gradient.
EVERYTHING = Given()


def numbered(plans: Sequence[Plan]) -> tuple[list[int], int]:
    """For each group the number of projected matrices before it; and their number in all groups."""
    firsts, count = [], 0
    for plan in plans:
        firsts.append(count)
        count += plan.matrices if plan.core.projection is not None else 0
    return firsts, count


def _counts(states: Sequence[State]) -> list[Tensor | None]:
    return [state.get("step") for state in states]


def _kinds(params: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(param.shape, param.dtype, param.device) for param in params]
