"""A comparison's results in one page that needs nothing but a browser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..choice import SEARCHED
from ..compare.memory import CATEGORIES
from ..compare.results import Results, Row
from ..compare.tables import CSV, JSON, TIMES, front, write_spread
from ..files import real_name, write_text
from ..units import MISSING, format_bytes, format_count, format_seconds, format_value
from .compare_figures import course_figures, difference_figure, memory_figure, plane_figure
from .compare_tuning import tuning_table
from .html import details, figures, notice, page, section, table
from .memory_figures import category_label
from .write import REPORT_NAME


def write_compare_report(results: Results, folder: Path) -> Path:
    """Writes report.html of a comparison.

    Returns:
        The file's path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    file = folder / REPORT_NAME
    write_text(file, render_compare(results, real_name(folder)))
    return file


def render_compare(results: Results, name: str) -> str:
    """Returns the page as HTML.

    Args:
        results: what to show.
        name: of the comparison.
    """
    if not results.rows:
        body = [_header(results, name), *_notices(results)]
        return page(f"{name}: comparison", body)
    return page(
        f"{name}: comparison",
        [
            _header(results, name),
            *_notices(results),
            section("Results", _result_table(results), _reading(results)),
            section("Quality", figures([difference_figure(results), plane_figure(results)])),
            section("Learning", figures(course_figures(results))),
            section("Memory", figures([memory_figure(results)]), _memory_table(results)),
            section("Time", _time_table(results)),
            section("Tuning", tuning_table(results)),
            section("Runs", _run_table(results)),
            section("Setting", _about(results)),
            f"<footer>{escape(CSV)} and {escape(JSON)} beside this page hold all figures; the"
            " folder runs has a run of lowrank pretrain for each. The page is one file and fetches"
            " nothing.</footer>",
        ],
    )


def _header(results: Results, name: str) -> str:
    about = results.about
    count, seeds = len(results.rows), about.get("seeds", [])
    return (
        f"<header><h1>{escape(name)}</h1>"
        f'<p class="lead"><b>{escape(str(about.get("model", "")))}</b> trained with <b>{count}</b>'
        f" methods on <b>{escape(str(about.get('data', '')))}</b>, {about.get('steps', 0):,} steps,"
        f" {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}; equal"
        f" {escape(str(about.get('equal', 'steps')))}"
        f"{', rates tuned on another seed' if about.get('tuned') else ''}.</p></header>"
    )


def _notices(results: Results) -> list[str]:
    """What a reader must know before trusting the figures."""
    texts = []
    if results.missing:
        some = ", ".join(f"{label} seed {seed}" for label, seed in results.missing[:4])
        more = f" and {len(results.missing) - 4} more" if len(results.missing) > 4 else ""
        texts.append(f"Not finished: {some}{more}. The figures are of the runs that have ended.")
    if any(len(results.shared) < row.asked for row in results.rows):
        seeds = ", ".join(map(str, sorted(results.shared)))
        others = [row.entry.label for row in results.rows if not results.ranks(row)]
        lacking = f" {', '.join(others)} did not and stand last." if others else ""
        texts.append(
            f"Methods are ranked, and the front is drawn, by seeds that they all finished: {seeds}."
            f"{lacking}"
        )
    texts += [f"{label} is left out: {reason}." for label, reason in results.skipped.items()]
    texts += [f"{label} has no row: {reason}." for label, reason in results.untuned.items()]
    texts += [f"{key} ended with an error: {text}" for key, text in results.failed.items()]
    if results.rows and max(len(row.seeds) for row in results.rows) < 2:
        texts.append("One seed tells nothing of the spread: differences may be chance.")
    if not results.about.get("tuned") and not results.rates:
        texts.append(
            "Nothing was tuned: each method ran with its preset's settings, and their order says as"
            " much of the presets as of the methods."
        )
    edges = [label for label, options in results.rates.items() if options.get("edge")]
    if edges:
        texts.append(f"The best rate lies at an end of the grid: {', '.join(edges)}.")
    return [notice(text) for text in texts]


def _result_table(results: Results) -> str:
    first = results.rows[0].entry.label
    best = front(results)
    head = (
        "#  method",
        "Validation loss",
        f"less {first}'s",
        "ours - theirs",
        "Perplexity",
        "Bits per byte",
        "State",
        "Seeds",
        "Front",
    )
    rows = []
    for place, row in enumerate(results.ordered, start=1):
        rows.append(
            (
                f"{place}  {row.entry.label}",
                write_spread(row.loss, of=row.asked),
                write_spread(row.against, signed=True, of=row.asked),
                write_spread(row.ours, signed=True, of=row.asked),
                write_spread(row.over("perplexity"), 2),
                write_spread(row.over("bits_per_byte")),
                format_bytes(row.state),
                str(len(row.seeds)) + (f" of {row.asked}" if len(row.seeds) < row.asked else ""),
                "yes" if row.entry.label in best else "",
            )
        )
    return table(rows, head=head, numeric=True, best=_best(results))


def _best(results: Results) -> list[list[bool]]:
    fair = [results.fair(row) if results.ranks(row) else None for row in results.ordered]
    losses = [math.inf if loss is None else loss.mean for loss in fair]
    return [[math.isfinite(loss) and loss == min(losses), *[False] * 7] for loss in losses]


def _reading(results: Results) -> str:
    remarks = [(row.entry.label, "; ".join(row.remarks)) for row in results.ordered if row.remarks]
    return (
        '<p class="lead">Mean and standard error over the seeds; differences are paired by seed,'
        " negative is better. Losses in nats per token.</p>"
        + (details("Remarks", table(remarks, head=("method", "remark"))) if remarks else "")
    )


def _memory_table(results: Results) -> str:
    head = ["method"]
    for name in CATEGORIES:
        head += [f"{category_label(name)}, predicted", "measured"]
    rows = []
    for row in results.ordered:
        cells = [row.entry.label]
        for name in CATEGORIES:
            cells += [format_bytes(row.predicted.get(name)), format_bytes(row.measured(name))]
        rows.append(cells)
    return details("Predicted and measured, by category", table(rows, head=head, numeric=True))


def _time_table(results: Results) -> str:
    head = ("method", "Optimizer", "Refresh", "Worst step", "Whole step", "Tokens")
    rows = [
        (
            row.entry.label,
            *(_milliseconds(row.median(name)) for name in TIMES),
            format_count(row.seeds[0].tokens),
        )
        for row in results.ordered
    ]
    return (
        table(rows, head=head, numeric=True)
        + '<p class="lead">The optimizer\'s own time: the median of steps without a refresh, of the'
        " refreshes of a step, and the worst step but the first; medians over the seeds. Official"
        " packages don't tell of refreshes. Runs that went side by side share the machine: the"
        " times compare methods roughly; lowrank's benchmarks measure them properly.</p>"
    )


def _milliseconds(value: float | None) -> str:
    return MISSING if value is None else format_seconds(value / 1e3)


def _run_table(results: Results) -> str:
    head = ("run", "Validation loss", "Perplexity", "Steps", "Skipped", "Optimizer", "Worst step")
    rows = [_run(item) for row in results.ordered for item in _seeds(row)]
    return details(f"All {len(rows):,} runs", table(rows, head=head, numeric=True))


def _seeds(row: Row) -> list[Any]:
    return sorted(row.seeds, key=lambda item: item.seed)


def _run(item: Any) -> tuple[str, ...]:
    return (
        item.key,
        "broke off" if math.isinf(item.val_loss) else f"{item.val_loss:.4f}",
        MISSING if item.perplexity is None else f"{item.perplexity:.2f}",
        f"{item.steps:,}",
        str(item.skipped),
        _milliseconds(item.optimizer_ms),
        _milliseconds(item.worst_ms),
    )


def _about(results: Results) -> str:
    rows = []
    for key, value in results.about.items():
        if key == "grid" or value in (None, {}, []):
            continue
        if isinstance(value, Mapping):
            inner = ((f"{key}.{name}", item) for name, item in value.items())
            rows += [(name, _written(item)) for name, item in inner]
        else:
            rows.append((key, _written(value)))
    options = [(row.entry.label, _options(row)) for row in results.ordered]
    return table(rows) + details("Options of each method", table(options))


def _options(row: Row) -> str:
    """All but those that are null because the method's own holds."""
    given = {k: v for k, v in row.options.items() if v is not None or k not in SEARCHED}
    return ", ".join(f"{key}={format_value(value)}" for key, value in given.items())


def _written(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value))
    return format_value(value)
