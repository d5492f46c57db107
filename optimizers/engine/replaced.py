"""Parameters that a wrapper replaced in the model: the optimizer's own get no gradient any more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, distributed, nn

from .options import Group
from .parameters import is_cut, names
from .sharding import is_dtensor
from .state import untouched
from .warn import warn_user

#: Parameters that are looked for in modules.
_SAMPLED = 16


class InUse:
    """Looks once, in a first step without gradients, whether modules still have the parameters.

    For optimizers that were made from parameters or groups, of whose model nothing is known.
    """

    def __init__(self) -> None:
        """Nothing was looked at yet."""
        self._settled = False

    def check(self, groups: Sequence[Group], state: Mapping[Tensor, Any]) -> None:
        """Raises `ValueError` if no parameter ever had a gradient and no module has one of them.

        Only where processes train together: elsewhere nothing replaces parameters by shards.
        """
        if self._settled:
            return
        params = [param for group in groups for param in group["params"]]
        if any(param.grad is not None for param in params):
            self._settled = True
            return
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if not all(untouched(state[param]) for param in params if state.get(param)):
            self._settled = True
            return
        if any(_has_owner(param) for param in params[:_SAMPLED]):
            self._settled = True
            return
        called = next((name for group in groups for name in names(group) if name), None)
        raise ValueError(
            f"no parameter of this optimizer{f' ({called}, ...)' if called else ''} has a gradient "
            "or is in a module any more: accepted is to make the optimizer after fully_shard(model)"
            " or another wrapper that replaces parameters"
        )


def _gets_gradients(param: Tensor | None) -> bool:
    return param is not None and param.requires_grad and param.grad is not None


def _has_owner(param: Tensor) -> bool:
    """Whether a dict with names as keys, as modules have one of their parameters, holds it."""
    return any(
        isinstance(found, dict)
        and any(value is param and isinstance(key, str) for key, value in [*found.items()])
        for found in gc.get_referrers(param)
    )


class Watch:
    """The model that an optimizer was built for, which it doesn't keep alive."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Remembers a model, and what of it is frozen and in no group."""
        self._model = weakref.ref(model)
        grouped = {id(param) for group in groups for param in group["params"]}
        # Modules, since a tensor with a weak reference can't be exchanged by `module.to`.
        self._frozen = [
            (weakref.ref(module), key, f"{called}.{key}" if called else key)
            for called, module in model.named_modules()
            for key, param in module.named_parameters(recurse=False)
            if not param.requires_grad and id(param) not in grouped
        ]
        self._idle: frozenset[int] = frozenset()
        self._first = {id(param) for param in model.parameters()}
        self._warned = False

    def check(self, groups: Sequence[Group]) -> None:
        """Looks at the model where parameters have begun to be without gradients, or with them.

        Raises:
            ValueError: the model has another parameter in the place of one of them.
        """
        if self._frozen:
            self._look_for_unfrozen(groups)
        idle = frozenset(
            id(param) for group in groups for param in group["params"] if param.grad is None
        )
        model = self._model()
        if idle == self._idle or model is None:
            return
        self._idle = idle
        if not idle:  # engines may have put flat partitions in the place of what is named
            return
        present = dict(model.named_parameters(remove_duplicate=False))
        self._look_for_lost(groups, idle, {id(param) for param in present.values()})
        for group in groups:
            for name, param in zip(names(group), group["params"], strict=True):
                other = present.get(name) if name and id(param) in idle else None
                if other is not None and is_dtensor(other) and not is_dtensor(param):
                    self._idle = frozenset()
                    raise ValueError(
                        f"{name} was replaced in the model by a DTensor since the optimizer was "
                        "built, so that it gets no gradient: accepted is to build the optimizer "
                        "after fully_shard(model)"
                    )

    def _look_for_unfrozen(self, groups: Sequence[Group]) -> None:
        """Warns once of parameters that have gradients now, and are in no group."""
        found = [
            called
            for module, key, called in self._frozen
            if _gets_gradients(getattr(module(), key, None))
        ]
        if not found:
            return
        model = self._model()
        grouped = {id(param) for group in groups for param in group["params"]}
        present = dict(model.named_parameters()) if model is not None else {}
        missed = [
            called for called in found if called in present and id(present[called]) not in grouped
        ]
        self._frozen = []
        if missed:
            warn_user(
                f"{len(missed)} parameters, such as {missed[0]}, have gradients, but were frozen "
                "when this optimizer was built, so that they are not trained: build it while they "
                "require gradients (they may be frozen afterwards), or add_param_group"
            )

    def _look_for_lost(
        self, groups: Sequence[Group], idle: frozenset[int], present: set[int]
    ) -> None:
        """Warns once of parameters without gradient that the model had, and has no more."""
        lost = [
            name
            for group in groups
            for name, param in zip(names(group), group["params"], strict=True)
            if name and id(param) in idle & self._first - present and not is_cut(param)
        ]
        sharded = distributed.is_available() and distributed.is_initialized()
        if lost and not self._warned and not sharded:
            self._warned = True
            warn_user(
                f"{len(lost)} parameters of this optimizer, such as {lost[0]}, are not in the model"
                " any more, so that they are not trained (after merge(model), build another "
                "optimizer)"
            )
