"""What is found: rows with a reference, a floor and an aim; JSON and a table."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One finding.

    Attributes:
        section: what it belongs to.
        name: what was measured.
        value: the number.
        unit: of it.
        aim: what it should be at most (or at least), in the same unit; None for none.
        at_least: the aim is a lower bound.
        note: anything else worth saying.
    """

    section: str
    name: str
    value: float
    unit: str
    aim: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without one."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim


@dataclass
class Record:
    """All findings of a run.

    Attributes:
        rows: in order.
        failures: what went wrong, with tracebacks; a section that fails doesn't stop the others.
        skipped: sections that there was no time for.
    """

    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, name: str, value: float, unit: str, **more: Any) -> None:
        """Adds a row and prints it."""
        row = Row(section, name, value, unit, **more)
        self.rows.append(row)
        print(line(row), flush=True)

    def attempt(self, section: str, work: Callable[[], None]) -> None:
        """Runs a section; what it raises is recorded."""
        print(f"== {section}", flush=True)
        try:
            work()
        except Exception:
            self.failures[section] = traceback.format_exc()
            print(self.failures[section], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save(self, folder: Path) -> Path:
        """Writes gpu-check.json."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "gpu-check.json"
        rows = [asdict(row) | {"met": row.met} for row in self.rows]
        content = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **machine(),
            **self.facts,
            "rows": rows,
            "failures": self.failures,
            "skipped": self.skipped,
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
        return path

    def table(self) -> str:
        """All rows, by section."""
        lines: list[str] = []
        section = ""
        for row in self.rows:
            if row.section != section:
                section = row.section
                lines.append(f"\n{section}")
            lines.append(line(row))
        lines += [f"\nFAILED: {name}" for name in self.failures]
        lines += [f"\nskipped, no time left: {name}" for name in self.skipped]
        return "\n".join(lines)


def line(row: Row) -> str:
    """One row of the table."""
    value = f"{row.value:.4g} {row.unit}"
    aim = ""
    if row.aim is not None:
        sign = ">=" if row.at_least else "<="
        aim = f"aim {sign} {row.aim:.4g}  {'met' if row.met else 'MISSED'}"
    return f"  {row.name:<58} {value:>16}  {aim:<26} {row.note}".rstrip()


def machine() -> dict[str, Any]:
    """Card, driver and versions."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            facts["driver"] = done.stdout.strip()
        except OSError:
            facts["driver"] = "unknown"
    return facts
