"""The table: mean and standard error over seeds, ours beside the official package."""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.results import processor, versions

from .entrants import Entrant
from .pool import Record
from .run import Job, data_hash
from .setting import Setting


@dataclass(frozen=True)
class Line:
    """One entrant's results over the seeds.

    Attributes:
        name: the entrant.
        official: whether it is an official package's.
        lr: of projected or hidden matrices.
        plain_lr: of embeddings, head and norms.
        losses: final validation loss by seed, nats per token.
        state_bytes: of the optimizer.
        ms_per_step: median of the optimizer's own time, one thread.
    """

    name: str
    official: bool
    lr: float
    plain_lr: float
    losses: dict[int, float]
    state_bytes: int
    ms_per_step: float

    @property
    def mean(self) -> float:
        """Mean loss."""
        return statistics.fmean(self.losses.values())

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return standard_error(list(self.losses.values()))

    def against(self, other: Line) -> tuple[float, float]:
        """Mean and standard error of the other's losses less these, paired by seed."""
        gaps = [other.losses[seed] - loss for seed, loss in self.losses.items()]
        return statistics.fmean(gaps), standard_error(gaps)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value, infinite where one of them is not finite."""
    if not all(math.isfinite(value) for value in values):
        return math.inf
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def lines(
    entrants: Sequence[Entrant], records: Mapping[Job, Record], jobs: Sequence[Job]
) -> list[Line]:
    """A line for each entrant that has runs, best first; official ones below their method."""
    made = {}
    for entrant in entrants:
        own = [job for job in jobs if job.name == entrant.name]
        if not own:
            continue
        runs = [records[job] for job in own]
        made[entrant.name] = Line(
            entrant.name,
            entrant.official,
            own[0].lr,
            own[0].plain_lr,
            {job.seed: run["val_loss"] for job, run in zip(own, runs, strict=True)},
            runs[0]["state_bytes"],
            statistics.median(run["ms_per_step"] for run in runs),
        )
    ordered = []
    for line in sorted((e for e in made.values() if not e.official), key=lambda e: e.mean):
        ordered.append(line)
        partners = [e.name for e in entrants if e.method == line.name and e.official]
        ordered += [made[name] for name in partners if name in made]
    shown = {line.name for line in ordered}
    return ordered + [line for line in made.values() if line.name not in shown]


def markdown(rows: Sequence[Line]) -> str:
    """The table in Markdown."""
    text = [
        "| method | validation loss | ours - theirs | perplexity | state, KiB | lr / plain_lr |",
        "|---|---|---|---|---|---|",
    ]
    above = rows[0] if rows else None
    for row in rows:
        gap = ""
        if row.official and above is not None:
            gap = "{:+.4f} +- {:.4f}".format(*row.against(above))
        elif not row.official:
            above = row
        name = f"&nbsp;&nbsp;{row.name}" if row.official else f"`{row.name}`"
        perplexity = f"{math.exp(row.mean):.1f}" if row.mean < 50 else "diverged"
        state = "" if row.official else f"{row.state_bytes / 1024:.0f}"
        text.append(
            f"| {name} | {row.mean:.4f} +- {row.error:.4f} | {gap} | {perplexity} | {state} "
            f"| {row.lr:g} / {row.plain_lr:g} |"
        )
    return "\n".join(text)


def record(rows: Sequence[Line], setting: Setting, command: str, seconds: float) -> dict[str, Any]:
    """For JSON: the rows and all that defines them."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "system": platform.platform()},
        "versions": versions(),
        "torch": torch.__version__,
        "setting": setting.as_dict(),
        "data_sha256": data_hash(setting),
        "seconds_of_runs": seconds,
        "rows": [
            {
                "name": row.name,
                "official": row.official,
                "lr": row.lr,
                "plain_lr": row.plain_lr,
                "val_loss": {str(seed): loss for seed, loss in row.losses.items()},
                "mean": row.mean,
                "standard_error": row.error,
                "state_bytes": row.state_bytes,
                "ms_per_step": row.ms_per_step,
            }
            for row in rows
        ],
    }


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON aside and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".json.new")
    # Infinite losses of runs that diverged become null.
    text = json.dumps(content, indent=2).replace("Infinity", "null")
    aside.write_text(text + "\n", "utf-8")
    aside.replace(path)
