"""The text and tables of a run's report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..table import share_of
from ..units import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_loss,
    format_perplexity,
    perplexity,
)
from .headline import Headline, headline
from .html import Card, cards, details, notice, table
from .runs import Run

_MAX_EVENT_ROWS = 200
_SHORT_EVENTS = 12  # a longer list opens only when asked


def header(run: Run) -> str:
    """The title and, in one sentence, what was trained, how, on what and when."""
    figures = headline(run)
    badge = (
        '<span class="badge done">finished</span>'
        if run.finished
        else '<span class="badge open">not finished</span>'
    )
    size = f" ({format_count(figures.parameters)} parameters)" if figures.parameters else ""
    began = "" if run.started is None else f" Started {run.started:%Y-%m-%d %H:%M} UTC."
    return (
        f"<header><h1>{escape(run.name)}{badge}</h1>"
        f'<p class="lead"><b>{escape(figures.model)}</b>{escape(size)} trained with '
        f"<b>{escape(figures.optimizer)}</b> on <b>{escape(figures.data)}</b>, "
        f"{escape(_extent(figures))}.{escape(began)}</p></header>"
    )


def _extent(figures: Headline) -> str:
    steps, total = figures.steps, figures.total_steps
    done = f"{steps or 0:,.0f} steps"
    if total and steps != total:
        done = f"{steps or 0:,.0f} of {total:,.0f} steps"
    return done if figures.tokens is None else f"{done}, {format_count(figures.tokens)} tokens"


def notices(run: Run) -> str:
    """What a reader must know before trusting the figures."""
    texts = []
    if not run.finished:
        texts.append(
            f"This run has not ended: it is going on, or was stopped. The last figures are of "
            f"{run.updated:%Y-%m-%d %H:%M} UTC; final ones below are the latest."
        )
    if run.damaged_lines:
        texts.append(
            f"{run.damaged_lines:,} damaged lines of metrics.jsonl were left out; "
            "curves may have holes."
        )
    if not len(run.loss):
        texts.append("No step has been logged yet.")
    return "\n".join(map(notice, texts))


def key_figures(run: Run) -> str:
    """The cards at the top."""
    figures = headline(run)
    state, adamw = figures.optimizer_state_bytes, figures.adamw_state_bytes
    share = state / adamw if state is not None and adamw else None
    each = f" on each of {figures.state_processes} processes" if figures.state_processes > 1 else ""
    loss, unigram = figures.val_loss, figures.unigram_val_loss
    above = loss is not None and unigram is not None and loss > unigram
    epochs = "" if figures.epochs is None else f"{_epochs(figures.epochs)}, "
    took = "" if figures.seconds is None else f" in {format_duration(figures.seconds)}"
    entries = [
        Card(
            "Validation loss",
            format_loss(loss),
            _from(format_loss(figures.initial_val_loss)),
            unit="nats/token",
        ),
        Card(
            "Perplexity",
            format_perplexity(figures.val_perplexity),
            _from(format_perplexity(figures.initial_perplexity)),
        ),
        Card(
            "Bits per byte",
            format_loss(figures.bits_per_byte),
            _from(format_loss(figures.initial_bits_per_byte)),
        ),
        Card(
            "Against the unigram mark",
            MISSING if loss is None or unigram is None else f"{loss - unigram:+.2f}",
            _mark_note(loss, unigram),
            unit="" if loss is None or unigram is None else "nats",
            mood="" if unigram is None or loss is None else ("bad" if above else "good"),
        ),
        Card(
            "Throughput",
            format_count(figures.tokens_per_second),
            f"{format_count(figures.tokens)} tokens{took}",
            unit="tokens/s",
        ),
        Card(
            "Optimizer state",
            format_bytes(state),
            each.strip()
            if share is None
            else f"{share_of(state, adamw)} of AdamW's {format_bytes(adamw)}{each}",
            share=share,
        ),
        Card(
            "Peak memory",
            format_bytes(figures.peak_memory_bytes),
            _where(str((run.summary or {}).get("device") or "")),
        ),
        Card(
            "Steps",
            f"{figures.steps or 0:,.0f}",
            f"{epochs}{figures.skipped_steps or 'none'} skipped{_also_skipped(figures)}",
        ),
    ]
    return cards(entries)


def _also_skipped(figures: Headline) -> str:
    """Updates and documents that were passed over, where there were any."""
    counts = (
        (figures.skipped_updates, "parameter update"),
        (figures.skipped_documents, "document"),
    )
    return "".join(
        f"; {count:,} {what}{'s' * (count != 1)} passed over" for count, what in counts if count
    )


def _mark_note(loss: float | None, unigram: float | None) -> str:
    if unigram is None:
        return "known once the run has ended"
    side = "" if loss is None else ("above " if loss > unigram else "better than ")
    return f"{side}the mark, {unigram:.3f}"


def _where(device: str) -> str:
    """What the peak of memory is measured of."""
    return f"allocated on {device}" if device.startswith("cuda") else "of the whole process"


def _from(start: str) -> str:
    return "" if start == MISSING else f"from {start} at the start"


def _epochs(epochs: float) -> str:
    return f"in epoch {int(epochs) + 1}"


def evaluation_table(run: Run) -> str:
    """A table of all evaluations."""
    if not len(run.val_loss):
        return ""
    bits = dict(
        zip(run.bits_per_byte.steps.tolist(), run.bits_per_byte.values.tolist(), strict=True)
    )
    rows = [
        (
            f"{step:,}",
            format_loss(loss, 4),
            format_perplexity(perplexity(loss)),
            format_loss(bits.get(step), 4),
        )
        for step, loss in zip(
            run.val_loss.steps.tolist(), run.val_loss.values.tolist(), strict=True
        )
    ]
    head = ("Step", "Validation loss", "Perplexity", "Bits per byte")
    return details(
        f"All {len(rows):,} evaluations in figures", table(rows, head=head, numeric=True)
    )


def measured_memory(run: Run) -> str:
    """Peaks of the steps that were measured phase by phase, beside the plan's."""
    if not run.measured_memory:
        return ""
    record = run.measured_memory[-1]
    measured, planned = (_sizes(record.get(key)) for key in ("measured", "planned"))
    rows = []
    for name, peak in measured.items():
        said = planned.get(name)
        off = MISSING if said is None or not peak else f"{said / peak - 1:+.1%}"
        rows.append((name, format_bytes(peak), format_bytes(said), off))
    head = ("Highest in", "Measured", "Planned", "Plan is off by")
    return table(rows, head=head, numeric=True)


def _sizes(value: object) -> dict[str, float]:
    """Bytes by name, as far as a record holds them."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {str(name): float(size) for name, size in items if isinstance(size, int | float)}


def event_table(run: Run) -> str:
    """Skipped steps and the method's own events."""
    marks = sorted(
        [(skip.step, "skipped step", f"{skip.name} {skip.detail}".strip()) for skip in run.skips]
        + [(event.step, event.name, event.detail) for event in run.events]
    )
    if not marks:
        return ""
    shown = marks[:_MAX_EVENT_ROWS]
    content = table(
        [(f"{step:,}", name, detail) for step, name, detail in shown],
        head=("Step", "What", "Detail"),
    )
    if len(marks) > len(shown):
        content += notice(f"The first {len(shown):,} of {len(marks):,}; all are in metrics.jsonl.")
    if len(marks) <= _SHORT_EVENTS:
        return content
    return details(f"{len(marks):,} events", content)


def configuration(run: Run) -> str:
    """The resolved configuration, one table a section of config.yaml."""
    top = {key: value for key, value in run.config.items() if not isinstance(value, Mapping)}
    groups: list[tuple[str, Mapping[str, object]]] = [("run", top)]
    groups += [(key, value) for key, value in run.config.items() if isinstance(value, Mapping)]
    blocks = [
        f'<div class="block"><h3>{escape(str(name))}</h3>{table(_flat(values))}</div>'
        for name, values in groups
        if values
    ]
    return f'<div class="columns">{"".join(blocks)}</div>' if blocks else ""


def environment(run: Run) -> str:
    """Everything in summary.json, machine and versions included."""
    if run.summary is None:
        return ""
    first = ("device", "lowrank_version", "torch_version", "python_version", "weights_sha256")
    named = [(key, _written(run.summary[key])) for key in first if key in run.summary]
    rest = _flat({key: value for key, value in run.summary.items() if key not in first})
    return (table(named) if named else "") + details("All of summary.json", table(rest))


def footer(run: Run) -> str:
    """Where the page comes from."""
    return (
        f"<footer>Made from {escape(run.name)}/metrics.jsonl, config.yaml and "
        "summary.json by lowrank. The page is one file and fetches nothing.</footer>"
    )


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Flattens nested mappings to dotted keys."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _written(value)))
    return rows


def _written(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_written, value)) or "none"
    return str(value)
