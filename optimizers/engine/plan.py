"""What a group's options mean, kept from step to step for as long as they stay.

To compose a group takes far longer than to look whether one of its options was changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_, itemgetter

import torch
from torch import Tensor

from ..rules.base import State
from . import checks
from .composition import Composition
from .geometry import Geometry
from .options import NO_OPTIONS, Group, check_lr
from .parameters import names

#: Options that change no entry of a state and not what one means.
SCALARS = frozenset(
    (
        *("betas", "eps", "weight_decay", "momentum", "nesterov", "clip_threshold", "decay_rate"),
        *("maximize", "foreach", "fused", "compile", "skip_nonfinite"),
    )
)
_NOTHING: State = {}


class Snapshot:
    """The values of a group's options, to see whether one was changed since."""

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

    def holds(self, group: Group) -> bool:
        """Whether all options are as they were; may say no where they are."""
        if len(group) != self._size:
            return False
        try:
            values = self._read(group)
            return tuple(map(type, values)) == self._types and bool(values == self._values)
        except (KeyError, RuntimeError, ValueError):  # a key less; tensors of several entries
            return False

    def changed(self, group: Group) -> set[str]:
        """Names of options that are other ones now, came or went."""
        now = {key: value for key, value in group.items() if key not in NO_OPTIONS}
        return {
            key
            for key in now.keys() | self.options.keys()
            if key not in now
            or key not in self.options
            or not checks.same(now[key], self.options[key])
        }


class Plan:
    """A group, what its options mean, and the parameters whose state was checked against it.

    Attributes:
        group: the group itself.
        snapshot: its options.
        core: what they mean, whatever the learning rate.
        composition: the same at the learning rate of this step.
        params: the parameters.
        states: their states; an empty one for a parameter without entries.
        seed_names: what the parameters' draws are made from, see `seeds`.
        geometries: of the parameters, in a projected group.
    """

    def __init__(
        self,
        group: Group,
        core: Composition,
        state: Mapping[Tensor, State],
        snapshot: Snapshot,
        seed_names: Sequence[str],
    ) -> None:
        """Records a group and state that fit together."""
        self.group, self.core, self.snapshot = group, core, snapshot
        self.composition, self._lr = core, group["lr"]
        self.params: list[Tensor] = list(group["params"])
        self.states = [state.get(param, _NOTHING) for param in self.params]
        self._sizes, self._kinds = list(map(len, self.states)), _kinds(self.params)
        self.names: Sequence[str | None] = list(names(group))
        self.seed_names = seed_names
        self.geometries: list[Geometry | None] = [None] * len(self.params)
        if core.projection is not None:
            self.geometries = [
                core.projection.geometry(param.shape) if param.numel() else None
                for param in self.params
            ]

    def current(self) -> bool:
        """Whether options are those that were composed."""
        return self.snapshot.holds(self.group) and (self.group["lr"] is None) == (self._lr is None)

    def settled(self, state: Mapping[Tensor, State]) -> bool:
        """Whether parameters and state are those that were checked."""
        params = self.group["params"]
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        states = [state.get(param, _NOTHING) for param in self.params]
        return (
            all(map(is_, states, self.states))
            and list(map(len, states)) == self._sizes
            and _kinds(self.params) == self._kinds
        )

    def read_rate(self) -> None:
        """Takes the learning rate that the group has now.

        Raises:
            ValueError: it is not one.
        """
        lr = self.group["lr"]
        if lr is self._lr and not (self.core.reads_rate and isinstance(lr, Tensor)):
            return  # a tensor that is changed in place stays the rule's
        if not isinstance(lr, Tensor):
            lr = checks.plain(lr)
            self.group["lr"] = lr
        if lr is not None:
            check_lr(lr)
        self.composition, self._lr = self.core.at_rate(self.group), lr


def _kinds(params: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(param.shape, param.dtype, param.device) for param in params]
