"""Optional modules, imported where they are needed and named clearly when they are missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A module of an optional extra is not installed; the message names the extra."""


def require(module: str, extra: str) -> Any:
    """Imports `module`, which the extra `extra` installs.

    Raises:
        MissingExtraError: the module, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed ({error}); install it with:"
            f' pip install "lowrank-pretrain[{extra}]"'
        ) from error
