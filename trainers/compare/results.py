"""What a comparison's runs say, read from their folders."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config_io import to_mapping
from ..report.headline import memory_categories
from ..report.runs import Run as RunRecords
from ..report.runs import read_run
from ..report.series import FloatArray
from .entries import Entry
from .memory import CATEGORIES
from .plan import Run
from .pool import Outcome
from .statistics import Spread, paired, spread

#: Steps at the start whose times are of warming up.
_WARMING = 1


@dataclass(frozen=True)
class Curve:
    """A run's loss in the course of its training.

    Attributes:
        steps: (N,) optimizer steps.
        tokens: (N,) tokens seen.
        seconds: (N,) time spent in steps, evaluations and checkpoints left out.
        loss: (N,) training loss, nats per token.
        val_tokens, val_seconds, val_loss: (M,) the same at each evaluation.
    """

    tokens: FloatArray
    seconds: FloatArray
    loss: FloatArray
    val_tokens: FloatArray
    val_seconds: FloatArray
    val_loss: FloatArray


@dataclass(frozen=True)
class Seed:
    """One run's figures; None where it has none.

    Attributes:
        key: the run's.
        seed: its seed.
        steps, tokens: done.
        val_loss: nats per token, infinite where training broke off.
        perplexity, bits_per_byte: of the last evaluation.
        optimizer_ms: median of the optimizer's own time, of steps without a refresh.
        refresh_ms: median time of the refreshes of a step that has some.
        worst_ms: the optimizer's own time in its worst step but the first.
        step_ms: median time of a whole step.
        skipped: steps that were skipped.
        reason: why it broke off, "" otherwise.
        memory: measured bytes by category, the largest of each.
        curve: None for a run that wrote no metrics.
    """

    key: str
    seed: int
    steps: int
    tokens: float
    val_loss: float
    perplexity: float | None
    bits_per_byte: float | None
    optimizer_ms: float | None
    refresh_ms: float | None
    worst_ms: float | None
    step_ms: float | None
    skipped: int
    reason: str
    memory: Mapping[str, float]
    curve: Curve | None


@dataclass(frozen=True)
class Row:
    """One method's figures over the seeds.

    Attributes:
        entry: the method.
        options: of its optimizer, as it was trained.
        seeds: a run each; those that are still missing are left out.
        predicted: bytes by category; of official packages without the state.
        remarks: what a reader must know of it.
        against: differences to the first method, seed by seed (negative: better).
        ours: of an official package, those of ours to it, where both took part.
        asked: how many seeds the comparison has.
    """

    entry: Entry
    options: Mapping[str, Any]
    seeds: tuple[Seed, ...]
    predicted: Mapping[str, int]
    remarks: tuple[str, ...] = ()
    against: Spread | None = None
    ours: Spread | None = None
    asked: int = 0

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss by seed."""
        return {item.seed: item.val_loss for item in self.seeds}

    @property
    def loss(self) -> Spread | None:
        """Of the final validation losses."""
        return spread(list(self.losses.values()))

    def over(self, name: str, seeds: Collection[int] | None = None) -> Spread | None:
        """Of a figure of `Seed`, over the seeds that have it.

        Args:
            name: the figure's.
            seeds: the only ones that count; all where None.
        """
        items = [item for item in self.seeds if seeds is None or item.seed in seeds]
        return spread([v for item in items if (v := getattr(item, name)) is not None])

    def median(self, name: str) -> float | None:
        """The median of a figure of `Seed`, which one disturbed run doesn't change."""
        values = [v for item in self.seeds if (v := getattr(item, name)) is not None]
        return statistics.median(values) if values else None

    def measured(self, category: str) -> float | None:
        """The most bytes of a category in any of the runs."""
        values = [item.memory[category] for item in self.seeds if category in item.memory]
        return max(values) if values else None

    @property
    def state(self) -> float | None:
        """Measured bytes of optimizer state."""
        values = [self.measured(name) for name in CATEGORIES[2:]]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    @property
    def held(self) -> float | None:
        """Measured bytes of weights and optimizer state."""
        weights, state = self.measured("weights"), self.state
        return None if weights is None or state is None else weights + state


@dataclass(frozen=True)
class Results:
    """A comparison's results.

    Attributes:
        rows: in the order of the methods.
        missing: label and seed of runs that haven't ended.
        skipped: label and reason of methods that can't be had here.
        failed: key and message of runs that ended with an error.
        rates: what was tuned, by label.
        about: everything else that defines the comparison.
        untuned: label and reason of methods without rates, of which nothing was trained.
    """

    rows: tuple[Row, ...]
    missing: tuple[tuple[str, int], ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    untuned: Mapping[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> frozenset[int]:
        """The seeds by which methods are ranked: those that all rows have finished.

        Where there is none, of the seed that most rows have finished, and those that these share.
        """
        counts = Counter(seed for row in self.rows for seed in row.losses)
        if not counts:
            return frozenset()
        most = min(counts, key=lambda seed: (-counts[seed], seed))
        having = [set(row.losses) for row in self.rows if most in row.losses]
        return frozenset(set.intersection(*having))

    def ranks(self, row: Row) -> bool:
        """Whether a row has all seeds by which methods are ranked."""
        return self.shared <= row.losses.keys()

    def fair(self, row: Row, name: str = "val_loss") -> Spread | None:
        """A figure of `Seed` over `shared`; over a row's own seeds where it lacks one of them."""
        return row.over(name, self.shared if self.ranks(row) else None)

    @property
    def ordered(self) -> list[Row]:
        """Best first by the seeds in `shared`, those without them last; official packages stand
        below ours of the same method.
        """

        def place(row: Row) -> tuple[bool, float]:
            loss = self.fair(row)
            return not self.ranks(row), math.inf if loss is None else loss.mean

        shown: list[Row] = []
        ranked = sorted((row for row in self.rows if row.loss), key=place)
        partners = {row.entry.optimizer for row in ranked}
        for row in ranked:
            if row.entry.optimizer != row.entry.method and row.entry.method in partners:
                continue
            shown.append(row)
            shown += [
                other
                for other in ranked
                if other.entry.optimizer != other.entry.method
                and other.entry.method == row.entry.optimizer
                and other not in shown
            ]
        return shown


def read_seed(run: Run, ended: Outcome) -> Seed:
    """The figures of a run that has ended."""
    summary = ended.summary
    records = read_run(ended.folder) if (ended.folder / "metrics.jsonl").is_file() else None
    times = optimizer_times(ended.folder) if records is not None else Times()
    return Seed(
        key=run.key,
        seed=run.seed,
        steps=int(summary.get("steps") or (len(records.loss) if records else 0)),
        tokens=float(summary.get("tokens") or (records.tokens.last if records else 0) or 0),
        val_loss=ended.loss,
        # A run that broke off must not vanish from its method's mean.
        perplexity=math.inf if ended.broke_off else summary.get("val_perplexity"),
        bits_per_byte=math.inf if ended.broke_off else summary.get("bits_per_byte"),
        optimizer_ms=times.optimizer_ms,
        refresh_ms=times.refresh_ms,
        worst_ms=times.worst_ms,
        step_ms=times.step_ms,
        skipped=int(summary.get("skipped_steps") or 0) + int(summary.get("skipped") or 0),
        reason=ended.reason,
        memory=memory_categories(records) if records is not None else {},
        curve=read_curve(records, times) if records is not None else None,
    )


@dataclass(frozen=True)
class Times:
    """Times of a run's steps, in milliseconds.

    Attributes:
        optimizer_ms, refresh_ms, worst_ms, step_ms: as in `Seed`.
        steps: (N,) seconds of each whole step.
    """

    optimizer_ms: float | None = None
    refresh_ms: float | None = None
    worst_ms: float | None = None
    step_ms: float | None = None
    steps: tuple[float, ...] = ()


def optimizer_times(folder: Path) -> Times:
    """Reads the times of a run's steps from its metrics.jsonl."""
    own: dict[int, float] = {}
    refreshes: dict[int, float] = {}
    whole: list[float] = []
    for line in (folder / "metrics.jsonl").read_text("utf-8", errors="replace").splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            continue  # a run that was killed leaves its last line open
        time = item.get("time", {})
        if item["kind"] == "train":
            whole.append(time["seconds"])
            if "optimizer_seconds" in time and item["step"] > _WARMING:
                own[item["step"]] = time["optimizer_seconds"]
        elif item["kind"] == "refresh" and item["step"] > _WARMING:
            refreshes[item["step"]] = time["seconds"]
    between = [seconds for step, seconds in own.items() if step not in refreshes]
    return Times(
        _median(between or list(own.values())),
        _median(list(refreshes.values())),
        1e3 * max(own.values()) if own else None,
        _median(whole[_WARMING:]),
        tuple(whole),
    )


def read_curve(records: RunRecords, times: Times) -> Curve | None:
    """The course of a run's losses."""
    import numpy as np

    if not len(records.loss) or len(records.tokens) == 0:
        return None
    steps = records.tokens.steps
    elapsed = np.concatenate([[0.0], np.cumsum(times.steps)])
    tokens = np.concatenate([[0.0], records.tokens.values])
    at = records.loss.steps
    evaluated = records.val_loss.steps
    last = min(len(elapsed), len(tokens)) - 1
    if len(steps) != last or (steps != np.arange(1, last + 1)).any():
        return None
    return Curve(
        tokens[at],
        elapsed[at],
        records.loss.values,
        tokens[evaluated],
        elapsed[evaluated],
        records.val_loss.values,
    )


def make_rows(
    runs: Mapping[str, Sequence[Run]],
    done: Mapping[str, Outcome],
    predictions: Mapping[str, Mapping[str, int]],
    remarks: Mapping[str, Sequence[str]],
) -> tuple[Row, ...]:
    """The rows of all methods that have a run that ended, in order.

    Args:
        runs: by label, in the order of the methods.
        done: by key.
        predictions: bytes by category, by label.
        remarks: by label.
    """
    made: list[Row] = []
    for label, own in runs.items():
        seeds = tuple(read_seed(run, done[run.key]) for run in own if run.key in done)
        if not seeds:
            continue
        options = to_mapping(own[0].config)["optimizer"]
        said = [*remarks.get(label, ())]
        said += [f"seed {item.seed} broke off: {item.reason}" for item in seeds if item.reason]
        said += [f"seed {item.seed} skipped {item.skipped}" for item in seeds if item.skipped]
        sizes = dict(predictions.get(label, {}))
        made.append(Row(own[0].entry, options, seeds, sizes, tuple(said), asked=len(own)))
    by_name = {row.entry.label: row for row in made}
    first = made[0] if made and next(iter(runs)) == made[0].entry.label else None
    finished = []
    for row in made:
        ours = by_name.get(row.entry.label.replace(row.entry.optimizer, row.entry.method, 1))
        official = row.entry.optimizer != row.entry.method
        finished.append(
            replace(
                row,
                against=None if first is None or row is first else paired(row.losses, first.losses),
                ours=paired(ours.losses, row.losses) if official and ours is not None else None,
            )
        )
    return tuple(finished)


def _median(seconds: Sequence[float]) -> float | None:
    return 1e3 * statistics.median(seconds) if seconds else None
