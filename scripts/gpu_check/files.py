"""Files of JSON that are whole at any time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def write(path: Path, content: Json) -> None:
    """Writes a file that is never half-written; numbers that JSON lacks become null."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(content), indent=1, default=str) + "\n")
    os.replace(partial, path)


def read(path: Path) -> Json:
    """What a file has; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
