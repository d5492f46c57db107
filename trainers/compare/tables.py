"""A comparison's results as results.csv, results.json and a table in Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from .memory import CATEGORIES
from .results import Results, Row, Seed
from .statistics import Spread, pareto

CSV, JSON = "results.csv", "results.json"
_SPREADS: tuple[tuple[str, Callable[[Row], Spread | None]], ...] = (
    ("val_loss", lambda row: row.loss),
    ("difference", lambda row: row.against),
    ("perplexity", lambda row: row.over("perplexity")),
    ("bits_per_byte", lambda row: row.over("bits_per_byte")),
)
TIMES = ("optimizer_ms", "refresh_ms", "worst_ms", "step_ms")


def front(results: Results) -> list[str]:
    """Labels on the Pareto front of memory (weights and state) and perplexity.

    Perplexities are of the seeds that all have; a method without them isn't on it.
    """
    points = {}
    for row in filter(results.ranks, results.rows):
        quality = results.fair(row, "perplexity")
        if row.held is not None and quality is not None and not any(s.reason for s in row.seeds):
            points[row.entry.label] = (row.held, quality.mean)
    return pareto(points)


def write_tables(results: Results, folder: Path) -> None:
    """Writes results.csv and results.json, each atomically."""
    write_text(folder / CSV, as_csv(results))
    text = json.dumps(_finite(as_dict(results)), indent=2, allow_nan=False)
    write_text(folder / JSON, text + "\n")


def as_csv(results: Results) -> str:
    """A line for each method, best first. Losses in nats per token, sizes in bytes."""
    best = front(results)
    stream = io.StringIO()
    lines = [_flat(row, row.entry.label in best) for row in results.ordered]
    writer = csv.DictWriter(stream, list(lines[0]) if lines else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _flat(row: Row, best: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"method": row.entry.label, "seeds": len(row.seeds)}
    for name, pick in _SPREADS:
        found = pick(row)
        line[name] = "" if found is None else found.mean
        line[f"{name}_error"] = "" if found is None or found.error is None else found.error
    for name in CATEGORIES:
        line[f"{name}_predicted"] = row.predicted.get(name, "")
        size = row.measured(name)
        line[f"{name}_measured"] = "" if size is None else int(size)
    for name in TIMES:
        value = row.median(name)
        line[name] = "" if value is None else value
    line["steps"], line["tokens"] = row.seeds[0].steps, int(row.seeds[0].tokens)
    line["pareto"] = int(best)
    line["options"] = json.dumps(dict(row.options), default=list)
    line["remarks"] = "; ".join(row.remarks)
    return line


def as_dict(results: Results) -> dict[str, Any]:
    """Everything but the curves."""
    best = front(results)
    return {
        **results.about,
        "rates": {label: dict(options) for label, options in results.rates.items()},
        "skipped": dict(results.skipped),
        "failed": dict(results.failed),
        "untuned": dict(results.untuned),
        "missing": [{"method": label, "seed": seed} for label, seed in results.missing],
        "pareto": best,
        "ranked_by_seeds": sorted(results.shared),
        "rows": [_row(row) for row in results.ordered],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "method": row.entry.label,
        "official": row.entry.optimizer != row.entry.method,
        "optimizer": dict(row.options),
        **{name: _spread(pick(row)) for name, pick in _SPREADS},
        "ours_minus_theirs": _spread(row.ours),
        "memory": {
            name: {"predicted": row.predicted.get(name), "measured": row.measured(name)}
            for name in CATEGORIES
        },
        "optimizer_state_bytes": row.state,
        **{name: row.median(name) for name in TIMES},
        "remarks": list(row.remarks),
        "runs": [_seed(item) for item in row.seeds],
    }


def _seed(item: Seed) -> dict[str, Any]:
    left_out = ("curve", "memory")
    return {key: value for key, value in vars(item).items() if key not in left_out} | {
        "memory": dict(item.memory)
    }


def _spread(found: Spread | None) -> dict[str, Any] | None:
    return None if found is None else {**vars(found)}


def _finite(value: Any) -> Any:
    """Numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_spread(found: Spread | None, digits: int = 4, signed: bool = False, of: int = 0) -> str:
    """A mean and its standard error, and how many seeds it is of where that is not all.

    Args:
        found: the mean.
        digits: after the point.
        signed: whether a plus is written.
        of: how many seeds the comparison has.
    """
    if found is None:
        return ""
    some = f" ({found.count} of {of} seeds)" if found.count < of else ""
    if not math.isfinite(found.mean):
        return f"broke off{some}"
    error = "" if found.error is None else f" +- {found.error:.{digits}f}"
    return f"{found.mean:{'+' if signed else ''}.{digits}f}{error}{some}"


def markdown(results: Results) -> str:
    """The table for documents and the terminal."""
    first = results.rows[0].entry.label if results.rows else ""
    lines = [
        f"| method | validation loss | less {first}'s | ours - theirs | perplexity | state, KiB "
        "| lr / plain_lr |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results.ordered:
        official = row.entry.optimizer != row.entry.method
        name = f"&nbsp;&nbsp;{row.entry.label}" if official else f"`{row.entry.label}`"
        quality = row.over("perplexity")
        perplexity = "" if quality is None else f"{quality.mean:.1f}"
        state = "" if row.state is None else f"{row.state / 1024:.0f}"
        lr, plain = row.options["lr"], row.options.get("plain_lr")
        plain = lr if plain is None else plain
        lines.append(
            f"| {name} | {write_spread(row.loss, of=row.asked)} "
            f"| {write_spread(row.against, signed=True, of=row.asked)} "
            f"| {write_spread(row.ours, signed=True, of=row.asked)} | {perplexity} | {state} "
            f"| {lr:g} / {plain:g} |"
        )
    return "\n".join(lines)
