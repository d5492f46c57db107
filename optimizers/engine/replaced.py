"""Parameters that a wrapper replaced in the model: the optimizer's own get no gradient any more."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from .options import Group
from .parameters import names
from .sharding import is_dtensor


class Watch:
    """The model that an optimizer was built for, which it doesn't keep alive."""

    def __init__(self, model: nn.Module) -> None:
        """Remembers a model."""
        self._model = weakref.ref(model)
        self._idle: frozenset[int] = frozenset()

    def check(self, groups: Sequence[Group]) -> None:
        """Looks at the model where parameters have begun to be without gradients.

        Raises:
            ValueError: the model has another parameter in the place of one of them.
        """
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
