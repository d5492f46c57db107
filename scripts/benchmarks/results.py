"""What came out: a table for the eye and JSON for the record."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .timing import Spread, disturbed, paired_ratios


@dataclass(frozen=True)
class Result:
    """One benchmark's samples.

    Attributes:
        name: "step", "refresh", "coap", "layers" or "kernels".
        title: heading of the table.
        labels: contestant to its row's label, in the order of the rows.
        samples: contestant to milliseconds by round.
        references: contestants the others are divided by, where they took part.
        canaries: milliseconds of the canary before the first round and after each.
        setting: everything else that defines the measurement.
        extra: contestant to further columns of numbers.
    """

    name: str
    title: str
    labels: Mapping[str, str]
    samples: Mapping[str, Sequence[float]]
    references: Sequence[str]
    canaries: Sequence[float]
    setting: Mapping[str, Any]
    extra: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def ratios(self, name: str) -> dict[str, Spread]:
        """Paired ratios of one contestant to each reference that took part."""
        return {
            reference: paired_ratios(self.samples[name], self.samples[reference])
            for reference in self.references
            if reference in self.samples
        }

    def as_dict(self, command: str) -> dict[str, Any]:
        """For JSON: medians, quartiles, ratios, all samples, machine, date and versions."""
        return {
            "benchmark": self.name,
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "setting": dict(self.setting),
            "disturbed": disturbed(self.canaries),
            "canary_ms": Spread.of(self.canaries).as_dict() | {"samples": list(self.canaries)},
            "results": {
                name: {
                    "label": self.labels[name],
                    "ms": Spread.of(values).as_dict(),
                    "ratio_to": {
                        reference: ratio.as_dict() for reference, ratio in self.ratios(name).items()
                    },
                    **self.extra.get(name, {}),
                    "samples_ms": list(values),
                }
                for name, values in self.samples.items()
            },
        }

    def table(self) -> Table:
        """Rows of contestants: milliseconds, quartiles, ratios, further columns."""
        columns = sorted({key for values in self.extra.values() for key in values})
        references = [name for name in self.references if name in self.samples]
        table = Table(title=self.title, title_justify="left", caption=self._caption())
        table.add_column("")
        for heading in ("ms", "quartiles", *(f"x {self.labels[name]}" for name in references)):
            table.add_column(heading, justify="right")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for name, label in self.labels.items():
            if name not in self.samples:
                continue
            spread, ratios = Spread.of(self.samples[name]), self.ratios(name)
            extra = self.extra.get(name, {})
            table.add_row(
                label,
                f"{spread.median:.1f}",
                f"{spread.lower:.1f} - {spread.upper:.1f}",
                *(f"{ratios[reference].median:.3f}" for reference in references),
                *(f"{extra[column]:.4f}" if column in extra else "" for column in columns),
            )
        return table

    def _caption(self) -> str:
        canaries = Spread.of(self.canaries)
        return (
            f"medians of {len(self.canaries) - 1} rounds, ratios paired within a round; "
            f"canary GEMM {canaries.median:.2f} ms ({min(self.canaries):.2f} to "
            f"{max(self.canaries):.2f})"
        )


def machine() -> dict[str, Any]:
    """Processor, cores, threads and system."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def processor() -> str:
    """The processor's name, as well as this system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and the packages that took part and are installed."""
    found = {"python": platform.python_version()}
    for name in ("lowrank-pretrain", "torch", "galore-torch", "fira", "apollo-torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(result: Result, folder: Path, command: str) -> Path:
    """Writes FOLDER/benchmark-NAME.json and returns its path; makes the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"benchmark-{result.name}.json"
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(result.as_dict(command), indent=2) + "\n", "utf-8")
    aside.replace(path)
    return path
