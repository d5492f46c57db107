"""metrics.jsonl: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .files import write_text, writing


class MetricsWriter:
    """Appends records to a file; each is one line, handed to the operating system at once.

    So a killed process loses no line; `sync` also survives a power cut.

    Raises:
        WriteError: the file can't be opened or written, from each method.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._stream = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends one record; numbers that are not finite become null."""
        record = _finite({"kind": kind, "step": step, **values})
        with writing(self._path):
            self._stream.write(json.dumps(record, allow_nan=False) + "\n")
            self._stream.flush()

    def sync(self) -> None:
        """Flushes the file to the disk."""
        with writing(self._path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file; failed writes were reported before."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def cut_after(path: Path, step: int) -> None:
    """Drops all records past `step`, and an incomplete last line, before a run is resumed.

    The file is replaced atomically. A file that is missing counts as empty.
    """
    kept: list[str] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            record = _record(line)
            if record is None or record["step"] > step:
                break
            kept.append(line)
    write_text(path, "".join(kept))


def _record(line: str) -> dict[str, Any] | None:
    """The record of a complete line, or None for an incomplete one."""
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
