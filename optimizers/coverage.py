"""What of a model is projected, in words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Size, Tensor, nn

from .engine.parameters import whole_shape
from .engine.warn import warn_user
from .targets import hidden_entries

#: Share of the hidden layers' entries below which a warning says what isn't projected.
EXPECTED = 0.75
#: Share of all parameters from which one that isn't projected is named.
LARGE = 0.01
#: Names of such parameters that are listed.
LISTED = 12
#: Names in the warning.
LARGEST = 4

_LOGGER = logging.getLogger("lowrank")
_SIZES = ("rank", "rank_ratio_matrix", "rank_ratio_cnn")


def projection_summary(groups: Sequence[Mapping[str, Any]]) -> str:
    """How many matrices are projected, what share of the parameters, and what large ones are not.

    `param_groups` logs it at INFO to the logger "lowrank", each text once.

    Args:
        groups: as `param_groups` returns them, or an optimizer's `param_groups`.
    """
    projected, plain = _sorted(groups)
    total = sum(shape.numel() for _, shape in [*projected, *plain])
    stacked = [shape for _, shape in projected if len(shape) == 3]
    matrices = len(projected) - len(stacked) + sum(shape[0] for shape in stacked)
    share = sum(shape.numel() for _, shape in projected) / max(total, 1)
    said = f"projected: {matrices} matrices, {share:.1%} of {total:,} parameters"
    if stacked:
        experts = sum(shape[0] for shape in stacked)
        said += f" ({experts} of the matrices are experts, in {len(stacked)} parameters)"
    parts = [(shape.numel() / max(total, 1), name) for name, shape in plain]
    large = sorted((part for part in parts if part[0] > LARGE), key=lambda part: -part[0])
    named = [f"{name} ({part:.1%})" for part, name in large[:LISTED]]
    if len(large) > LISTED:
        named.append(f"{len(large) - LISTED} more")
    return f"{said}; not projected, of more than {LARGE:.0%} each: {', '.join(named) or 'none'}"


@lru_cache(maxsize=1024)
def tell(text: str) -> None:
    """Logs a text at INFO, once."""
    _LOGGER.info(text)


def _sorted(groups: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, Size]], ...]:
    lists: tuple[list[tuple[str, Size]], ...] = ([], [])
    for index, group in enumerate(groups):
        sized = any(group.get(name) is not None for name in _SIZES)
        params: list[Tensor] = list(group["params"])
        names = group.get("param_names") or [f"group{index}.{i}" for i in range(len(params))]
        lists[0 if sized else 1].extend(zip(names, map(whole_shape, params), strict=True))
    return lists


def warn_of_left_out(model: nn.Module, chosen: Iterable[str], how: str) -> None:
    """Warns if less than three quarters of the hidden layers' trained entries are chosen.

    Args:
        model: the model.
        chosen: names of parameters.
        how: what they are, for the message.
    """
    chosen = {*chosen}
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    entries = {name: n for name, n in hidden_entries(model).items() if name in trained}
    total = sum(entries.values())
    share = sum(n for name, n in entries.items() if name in chosen) / max(total, 1)
    left = sorted((name for name in entries if name not in chosen), key=lambda n: -entries[n])
    if share < EXPECTED and left:
        named = ", ".join(f"{name} ({entries[name] / total:.1%})" for name in left[:LARGEST])
        more = f" and {len(left) - LARGEST} more" if len(left) > LARGEST else ""
        warn_user(
            f"{share:.0%} of the {total:,} entries of {type(model).__name__}'s hidden layers are "
            f"{how}; the largest that are not: {named}{more} (patterns selects others)"
        )
