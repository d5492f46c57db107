"""Reading a run's folder: config.yaml, metrics.jsonl and, once the run has ended, summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..files import real_name
from ..missing import require
from .series import Series

MEMORY_CATEGORIES = ("weights", "gradients", "moments", "basis", "other_state")
"""What a run's memory is made of; `process` and `peak` are measured from outside."""
_MEMORY_KEYS = (*MEMORY_CATEGORIES, "process", "peak")

Record = Mapping[str, object]


class RunFolderError(ValueError):
    """A folder that cannot be read as a run's."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at one step.

    Attributes:
        step: Completed optimizer steps when it happened.
        name: What it was: a skip's reason or an event's name.
        detail: In words, "" where there is nothing more to say.
    """

    step: int
    name: str
    detail: str


@dataclass(frozen=True, eq=False)
class Run:
    """All that a run's folder tells. Series are empty where a run has nothing to tell.

    Attributes:
        folder: Where it was read from.
        name: The folder's name.
        config: The resolved configuration, nested as in config.yaml.
        summary: summary.json, None while the run has not ended.
        started: When config.yaml was written, None without one.
        updated: When metrics.jsonl was last written.
        damaged_lines: Lines of metrics.jsonl that could not be read and were left out; a last
            line without its end, which a killed run leaves, is not counted.
        loss, learning_rate, gradient_norm, tokens, epoch: One point a step.
        skipped_updates: Parameter updates that the optimizer left out so far, one point a step.
        tokens_per_second: One point a step.
        memory: Bytes by category, see MEMORY_CATEGORIES, and `process`, `peak`.
        val_loss, val_perplexity, bits_per_byte: One point an evaluation.
        refresh_seconds, captured_energy, captured_energy_min, overlap: One point a step on which
            at least one matrix got a new basis.
        skips: Steps whose update was skipped.
        events: What a method did on its own schedule: merges, switches, new samples.
        measured_memory: The records of steps measured phase by phase, beside the plan's bytes.
    """

    folder: Path
    name: str
    config: Mapping[str, object]
    summary: Record | None
    started: datetime | None
    updated: datetime
    damaged_lines: int
    loss: Series
    learning_rate: Series
    gradient_norm: Series
    tokens: Series
    epoch: Series
    skipped_updates: Series
    tokens_per_second: Series
    memory: Mapping[str, Series]
    val_loss: Series
    val_perplexity: Series
    bits_per_byte: Series
    refresh_seconds: Series
    captured_energy: Series
    captured_energy_min: Series
    overlap: Series
    skips: tuple[Mark, ...]
    events: tuple[Mark, ...]
    measured_memory: tuple[Record, ...]

    @property
    def finished(self) -> bool:
        """Whether the run has ended and written its summary."""
        return self.summary is not None


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Args:
        folder: Holds metrics.jsonl, and config.yaml and summary.json where they are written.

    Raises:
        RunFolderError: The folder is none of a run, or one of its files cannot be read.
        MissingExtraError: PyYAML is not installed.
    """
    metrics = folder / "metrics.jsonl"
    for file in (metrics, folder / "config.yaml", folder / "summary.json"):
        if file.is_symlink() and not file.exists():  # `exists` is False of a loop, too
            raise RunFolderError(f"{file} is a symbolic link that leads to no file")
    if not metrics.is_file():
        raise RunFolderError(f"{folder} is not a run's folder: it holds no metrics.jsonl")
    records, damaged = _read_lines(metrics)
    by_kind: dict[object, list[Record]] = {}
    for record in records:
        by_kind.setdefault(record.get("kind"), []).append(record)
    train, evals = by_kind.get("train", []), by_kind.get("eval", [])
    refreshes = by_kind.get("refresh", [])
    config_file = folder / "config.yaml"
    return Run(
        folder=folder,
        name=real_name(folder),
        config=_read_config(config_file),
        summary=_read_summary(folder / "summary.json"),
        started=_modified(config_file) if config_file.exists() else None,
        updated=_modified(metrics),
        damaged_lines=damaged,
        loss=_series(train, "loss"),
        learning_rate=_series(train, "lr"),
        gradient_norm=_series(train, "grad_norm"),
        tokens=_series(train, "tokens"),
        epoch=_series(train, "epoch"),
        skipped_updates=_series(train, "skipped"),
        tokens_per_second=_series(train, "tokens_per_second", within="time"),
        memory={key: _series(train, key, within="memory") for key in _MEMORY_KEYS},
        val_loss=_series(evals, "val_loss"),
        val_perplexity=_series(evals, "val_perplexity"),
        bits_per_byte=_series(evals, "bits_per_byte"),
        refresh_seconds=_series(refreshes, "seconds", within="time"),
        captured_energy=_series(refreshes, "captured_energy"),
        captured_energy_min=_series(refreshes, "captured_energy_min"),
        overlap=_series(refreshes, "overlap"),
        skips=_marks(by_kind.get("skip", []), "reason", "value"),
        events=_marks(by_kind.get("event", []), "name", "detail"),
        measured_memory=tuple(by_kind.get("memory", [])),
    )


def _read_lines(file: Path) -> tuple[list[Record], int]:
    """Reads the records of metrics.jsonl, and counts the lines that are none."""
    records: list[Record] = []
    damaged = 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            # A run that was killed, or is just writing, leaves its last line open.
            damaged += line.endswith(b"\n")
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _series(records: Iterable[Record], key: str, *, within: str | None = None) -> Series:
    points: list[tuple[int, float]] = []
    for record in records:
        holder = record if within is None else record.get(within)
        value = holder.get(key) if isinstance(holder, Mapping) else None
        step = record["step"]
        if isinstance(value, (int, float)) and isinstance(step, int):
            points.append((step, float(value)))
    return Series.of(points)


def _marks(records: Iterable[Record], name: str, detail: str) -> tuple[Mark, ...]:
    return tuple(
        Mark(int(str(record["step"])), str(record.get(name, "")), _in_words(record.get(detail)))
        for record in records
    )


def _in_words(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(inner)}" for key, inner in value.items())
    return str(value)


def _read_config(file: Path) -> Mapping[str, object]:
    if not file.exists():
        return {}
    yaml = require("yaml", "train")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RunFolderError(f"{file} holds a {type(content).__name__}; a mapping is accepted")
    return content


def _read_summary(file: Path) -> Record | None:
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{file} holds a {type(content).__name__}; an object is accepted")
    return content


def _modified(file: Path) -> datetime:
    return datetime.fromtimestamp(file.stat().st_mtime, tz=UTC)
