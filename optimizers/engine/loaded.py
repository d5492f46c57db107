"""What is wrong with a state that was loaded, but no reason to refuse it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .gradients import largest_of
from .options import Group
from .parameters import unique_names
from .sharding import local_part
from .warn import warn_user


def warn_of_nonfinite(
    optimizer: str, groups: Sequence[Group], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Warns, once, of entries of a state that hold NaN or infinity, of what is on this process.

    Each is read once; what differs in device or dtype is read apart.

    Args:
        optimizer: its name.
        groups: its groups.
        state: its state.
    """
    params = [param for group in groups for param in group["params"]]
    kinds: dict[Any, list[tuple[str, str, Tensor]]] = {}
    for name, param in zip(unique_names(groups), params, strict=True):
        for entry, value in state.get(param, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
                held = local_part(value)
                kinds.setdefault((held.device, held.dtype), []).append((name, entry, held))
    found = [
        (name, entry)
        for kind in kinds.values()
        for (name, entry, _), largest in zip(
            kind, largest_of([held for _, _, held in kind]), strict=True
        )
        if not math.isfinite(largest)
    ]
    if found:
        name, entry = found[0]
        others = f", and {len(found) - 1} other entries" if len(found) > 1 else ""
        warn_user(
            f"{optimizer}: the loaded state of {name} has NaN or infinity in {entry}{others}; what "
            "they update becomes so too: load a checkpoint from before, or delete them from the "
            "state (optimizer.state.pop(parameter))"
        )
