"""What was measured, in a file, so that a run that was cut short goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..summary import package_version
from .measure import Measured
from .result import PHASES, Plan


class Record:
    """Measurements by what was planned, a JSON object a line.

    Only those of equal settings, versions and threads are found again; the code itself is not
    compared, so that a new file is needed after it was changed.

    Args:
        path: of the file, which need not exist.

    Raises:
        ValueError: the file can't be read or written, or has other lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Measured] = {}
        try:
            with path.open("a+b") as file:
                file.seek(0)
                self._read(file.read())
        except OSError as error:
            raise ValueError(
                f"--record {path}: accepted is a file that can be written ({error.strerror})"
            ) from None

    def _read(self, data: bytes) -> None:
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                found = Measured(**entry["measured"])
                numbers = (found.weights, found.gradients, found.state, *found.peaks.values())
                if not all(type(value) is int for value in numbers) or not {*found.peaks} <= {
                    *PHASES
                }:
                    raise ValueError
                self._known[_key(entry["setting"])] = found
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"--record {self._path}: line {number} is no measurement; accepted is a new "
                    "file, or one of lowrank plan --measure"
                ) from None
        if len(whole) < len(data):  # a line that was cut off as it was written
            os.truncate(self._path, len(whole))

    def find(self, plan: Plan) -> Measured | None:
        """What was measured of a plan."""
        return self._known.get(_key(_described(plan)))

    def add(self, plan: Plan, found: Measured) -> None:
        """Writes a measurement.

        Raises:
            OSError: there is no room for it, or the like.
        """
        setting = _described(plan)
        line = json.dumps({"setting": setting, "measured": asdict(found)})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._known[_key(setting)] = found


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model,
        "config": _digest(Path(plan.model)),
        "optimizer": plan.optimizer,
        **plan.setting,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lowrank": package_version(),
    }


def _digest(file: Path) -> str | None:
    """Of a model's configuration, which may change while its name stays."""
    file = file / "config.json" if file.is_dir() else file
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _key(setting: Any) -> str:
    return json.dumps(setting, sort_keys=True)
