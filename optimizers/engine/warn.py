"""Warnings that name the user's line, however deep in this package they come up."""

from __future__ import annotations

import sys
import warnings


def warn_user(message: str) -> None:
    """A `UserWarning` at the innermost line outside of this package and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("lowrank", "torch"):
            break
    warnings.warn(message, stacklevel=level)
