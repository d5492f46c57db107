"""What a section finds: checks, rows with aims, what was skipped and what failed, as JSON."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import Json, read, write

#: Why things are skipped when a section's time is up.
NO_TIME = "no time left"


class DeviceLost(RuntimeError):
    """The device refuses all further work of this process."""


@dataclass
class Row:
    """One number.

    Attributes:
        group: what it belongs to.
        name: what was measured.
        value: the number.
        unit: of it.
        aim: what it should be at most (or at least), in the same unit; None for none.
        at_least: the aim is a lower bound.
        note: anything else worth saying.
        details: further numbers, for JSON alone.
    """

    group: str
    name: str
    value: float
    unit: str
    aim: float | None = None
    at_least: bool = False
    note: str = ""
    details: Json = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without one."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    def line(self) -> str:
        """For people."""
        value = f"{self.value:.4g} {self.unit}"
        aim = ""
        if self.aim is not None:
            sign = ">=" if self.at_least else "<="
            aim = f"aim {sign} {self.aim:.4g} {'met' if self.met else 'MISSED'}"
        return f"  {self.group:<5} {self.name:<46} {value:>15}  {aim:<22} {self.note}".rstrip()


class Record:
    """The findings of one section, written to its file whenever something is found.

    Attributes:
        section: name.
        path: of the file.
        state: "running" until the section says what became of it.
        facts: what else belongs into the file.
    """

    def __init__(self, section: str, path: Path, facts: Json, *, resume: bool = False) -> None:
        """Begins the file.

        Args:
            section: name.
            path: of the file, in a folder that is there.
            facts: what else belongs into it.
            resume: go on with the file of a process that ended: what it tried is not tried again.
        """
        self.section, self.path, self.facts = section, path, dict(facts)
        self.state = "running"
        self.current: str | None = None
        self.rows: list[Row] = []
        self.checks: list[Json] = []
        self.skipped: list[Json] = []
        self.errors: list[Json] = []
        self.done: list[str] = []
        self._begun = time.monotonic()
        self._before = 0.0
        if resume:
            self._go_on(read(path))
        self.save()

    def _go_on(self, former: Json) -> None:
        fields = {f for f in Row.__dataclass_fields__}
        self.rows = [Row(**{k: v for k, v in row.items() if k in fields}) for row in former["rows"]]
        self.checks, self.skipped = former["checks"], former["skipped"]
        self.errors, self.done = former["errors"], former["done"]
        self.facts = former["facts"] | self.facts
        self._before = former["seconds"]
        if former["current"] is not None and former["current"] not in self.done:
            self.done.append(former["current"])

    # Findings

    def add(self, group: str, name: str, value: float, unit: str, **more: Any) -> None:
        """Adds a row and prints it; for `more` see `Row`."""
        row = Row(group, name, value, unit, **more)
        self.rows.append(row)
        print(row.line(), flush=True)
        self.save()

    def value(self, group: str, name: str) -> float | None:
        """Of a row that is there."""
        found = [row.value for row in self.rows if (row.group, row.name) == (group, name)]
        return found[-1] if found else None

    def check(self, name: str, passed: bool, detail: str = "", **more: Any) -> None:
        """Records whether something is correct; what is not decides on the exit status."""
        self.checks.append({"name": name, "passed": passed, "detail": detail, **more})
        if not passed:
            print(f"  FAILED {name}: {detail}", flush=True)
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Records what was not measured."""
        self.skipped.append({"what": what, "why": why})
        print(f"  skipped {what}: {why}", flush=True)
        self.save()

    def attempt(
        self, label: str, work: Callable[[], None], *, clean: bool = True, again: bool = False
    ) -> bool:
        """Does a piece of work, once; what it raises is recorded and stops nothing else.

        Args:
            label: name of the piece within its section.
            work: adds findings.
            clean: give memory back afterwards.
            again: also where it was done before the section was taken up again.

        Returns:
            Whether it was done without an error.

        Raises:
            DeviceLost: nothing more can be done in this process.
        """
        if label in self.done and not again:
            return False
        self.current = label
        self.save()
        good, before = False, len(self.rows) + len(self.checks)
        try:
            work()
            good = True
        except torch.OutOfMemoryError as error:
            self.skip(label, f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:
            self.error(label, f"{type(error).__name__}: {error}", traceback.format_exc())
        self.current = None
        if label not in self.done:
            self.done.append(label)
        self.save()
        if not good:
            _check_device()
        if not good or (clean and len(self.rows) + len(self.checks) > before):
            release()
        return good

    def error(self, label: str, message: str, trace: str = "") -> None:
        """Records what went wrong."""
        self.errors.append({"where": label, "message": message[:2000], "traceback": trace[-6000:]})
        print(f"  ERROR in {label}: {message[:600]}", flush=True)
        self.save()

    # The file

    def save(self) -> None:
        """Writes the file; it is whole at any time."""
        content = {
            "section": self.section,
            "state": self.state,
            "seconds": round(self._before + time.monotonic() - self._begun, 3),
            "facts": self.facts,
            "checks": self.checks,
            "rows": [asdict(row) | {"met": row.met} for row in self.rows],
            "skipped": self.skipped,
            "errors": self.errors,
            "done": self.done,
            "current": self.current,
        }
        write(self.path, content)


def release() -> None:
    """Gives back what a piece of work left behind."""
    gc.collect()
    if _uses_cuda():
        torch.cuda.empty_cache()


def _check_device() -> None:
    if not _uses_cuda():
        return
    try:
        torch.cuda.synchronize()
        if float(torch.ones(8, device="cuda").sum()) != 8.0:
            raise DeviceLost("the device computes nonsense")
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


def _uses_cuda() -> bool:
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.is_available() and bool(begun)
