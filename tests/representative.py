"""Tests with every method, of which some run more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def with_representative(
    names: Sequence[Any], chosen: Sequence[Any], marks: Sequence[Any] = (pytest.mark.slow,)
) -> list[Any]:
    """Parameters of a test: `marks` for the chosen names, exhaustive for the others."""
    return [
        pytest.param(name, marks=marks if name in chosen else pytest.mark.exhaustive, id=str(name))
        for name in names
    ]
