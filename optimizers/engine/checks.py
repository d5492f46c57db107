"""Validation of options: a `ValueError` with the name, the value and what is accepted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor

_PLAIN = (float, int, bool, str, type(None))


def plain(value: Any) -> Any:
    """Converts a 0-d NumPy or torch number to a Python number; other values are returned unchanged.

    Tuples and lists are converted entry by entry. A tensor on a device is read back.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (tuple, list):
        return value if all(type(v) in _PLAIN for v in value) else kind(map(plain, value))
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 and not value.is_meta else value
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        number = value.item()
        return number if type(number) in _PLAIN else float(number)
    return value


def same(value: Any, other: Any) -> bool:
    """Whether an option has the same value and type; tensors are compared by identity."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return value is other
    try:
        return type(value) is type(other) and bool(value == other)
    except (RuntimeError, ValueError):
        return False


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name closest to `name`, or None when none is close."""
    return _nearest(name, tuple(sorted(known)), cutoff)


@lru_cache(maxsize=256)  # each loaded group of parameters asks again for the same names
def _nearest(name: str, known: tuple[str, ...], cutoff: float) -> str | None:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name: names the nearest known one, else lists all of them."""
    choices = sorted(known)
    guess = nearest(name, choices)
    hint = f"did you mean {guess!r}?" if guess else f"accepted: {', '.join(choices)}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises `ValueError` unless `value` is a finite number in the given range."""
    value = plain(value)
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if valid:
        valid = (value > low if low_open else value >= low) and (
            value < high if high_open else value <= high
        )
    if not valid:
        opening, closing = "(" if low_open else "[", ")" if high_open else "]"
        within = f"a number in {opening}{low}, {high}{closing}"
        if math.isinf(high):
            bound = f" {'above' if low_open else 'of at least'} {low}"
            within = f"a finite number{'' if math.isinf(low) else bound}"
        raise ValueError(f"{name}={value!r}: accepted is {within}")


def integer(name: str, value: Any, *, low: int) -> None:
    """Raises `ValueError` unless `value` is an integer of at least `low`."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r}: accepted is an integer of at least {low}")


def choice(name: str, value: Any, accepted: Iterable[Any]) -> None:
    """Raises `ValueError` unless `value` is one of `accepted`."""
    options = list(accepted)
    if not any(value is option or value == option for option in options):
        raise ValueError(f"{name}={value!r}: accepted are {', '.join(map(repr, options))}")


def betas(value: Any, count: int = 2) -> None:
    """Raises `ValueError` unless `value` holds `count` decay rates in [0, 1)."""
    if not isinstance(value, tuple | list) or len(value) != count:
        raise ValueError(f"betas={value!r}: accepted are {count} numbers in [0, 1)")
    for index, beta in enumerate(value):
        number(f"betas[{index}]", beta, low=0.0, high=1.0, high_open=True)
