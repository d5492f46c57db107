"""The cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """``$LOWRANK_CACHE``, else ``$XDG_CACHE_HOME/lowrank``, else ``~/.cache/lowrank``; not created.

    Args:
        environment: In place of the process's own.
    """
    variables = os.environ if environment is None else environment
    if own := variables.get("LOWRANK_CACHE"):
        return Path(own).expanduser()
    if shared := variables.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lowrank"
    return Path("~/.cache/lowrank").expanduser()
