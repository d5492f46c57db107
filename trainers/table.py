"""The summary table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from .units import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_loss,
    format_perplexity,
    perplexity,
)

#: What is told only where there was any: the summary's key, its name, what it means.
_SKIPPED = (
    ("skipped_steps", "Skipped steps", "loss or gradient not finite, or a spike"),
    ("skipped", "Skipped updates", "of single parameters, gradient not finite"),
    ("skipped_documents", "Skipped documents", "unusable, again in each epoch"),
    ("skipped_validation_documents", "Skipped in validation", "unusable documents"),
)


def summary_table(summary: Mapping[str, object]) -> Table:
    """Builds the table of a finished run from its summary.json.

    Args:
        summary: The content of summary.json; what is absent or null reads as "--".

    Returns:
        A table that fits 80 columns: each figure at the start, at the end and what to hold it
        against.
    """
    title = f"{summary.get('model', 'model')}, {summary.get('optimizer', 'optimizer')}"
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column("end", justify="right", style="bold", no_wrap=True)
    table.add_column("", style="dim")
    for row in _quality_rows(summary) + _cost_rows(summary):
        # Text, not str: a name with brackets in it must not be read as markup.
        table.add_row(*(Text(cell) for cell in row))
    return table


def number(summary: Mapping[str, object], key: str) -> float | None:
    """Returns a figure of the summary, None where it is absent, null or no number."""
    value = summary.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def initial_bits_per_byte(
    initial_loss: float | None, final_loss: float | None, final_bits: float | None
) -> float | None:
    """Derives the first bits per byte: on a fixed text they are proportional to the loss."""
    if initial_loss is None or not final_loss or final_bits is None:
        return None
    return final_bits * initial_loss / final_loss


def share_of(part: float | None, whole: float | None) -> str:
    """Writes `part` as a percentage of `whole`, "" where either is unknown."""
    if part is None or not whole:
        return ""
    percent = 100 * part / whole
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.1f}%"


def unigram_verdict(final_loss: float | None, unigram_loss: float | None) -> str:
    """Says how a validation loss stands to the unigram entropy, the mark a model must beat."""
    if unigram_loss is None:
        return ""
    if final_loss is None:
        return f"unigram mark {unigram_loss:.3f}"
    gap = unigram_loss - final_loss
    side = "below" if gap >= 0 else "ABOVE"
    return f"{abs(gap):.2f} nats {side} the unigram mark, {unigram_loss:.3f}"


def _quality_rows(summary: Mapping[str, object]) -> list[tuple[str, str, str, str]]:
    first, last = number(summary, "initial_val_loss"), number(summary, "val_loss")
    last_perplexity = number(summary, "val_perplexity")
    bits = number(summary, "bits_per_byte")
    first_bits = initial_bits_per_byte(first, last, bits)
    first_perplexity = None if first is None else perplexity(first)
    return [
        (
            "Validation loss",
            format_loss(first),
            format_loss(last),
            unigram_verdict(last, number(summary, "unigram_val_loss")),
        ),
        (
            "Perplexity",
            format_perplexity(first_perplexity),
            format_perplexity(last_perplexity),
            "",
        ),
        ("Bits per byte", format_loss(first_bits), format_loss(bits), ""),
    ]


def _cost_rows(summary: Mapping[str, object]) -> list[tuple[str, str, str, str]]:
    tokens, seconds = number(summary, "tokens"), number(summary, "wall_seconds")
    state, adamw = number(summary, "optimizer_state_bytes"), number(summary, "adamw_state_bytes")
    processes = int(number(summary, "state_processes") or 1)
    each = f" on each of {processes} processes" if processes > 1 else ""
    steps = number(summary, "steps")
    work = [] if steps is None else [f"{steps:,.0f} steps"]
    if tokens is not None:
        work.append(f"{format_count(tokens)} tokens")
    if seconds is not None:
        work.append(f"in {format_duration(seconds)}")
    rows = [
        (
            "Tokens per second",
            "",
            format_count(number(summary, "tokens_per_second")),
            " ".join(work),
        ),
        (
            "Optimizer state",
            "",
            format_mebibytes(state),
            ""
            if state is None or not adamw
            else f"{share_of(state, adamw)} of AdamW's {format_mebibytes(adamw)}{each}",
        ),
        (
            "Peak memory",
            "",
            format_bytes(number(summary, "peak_memory_bytes")),
            str(summary.get("device") or ""),
        ),
    ]
    rows += [
        (name, "", f"{count:,.0f}", remark)
        for key, name, remark in _SKIPPED
        if (count := number(summary, key))
    ]
    return rows


def format_mebibytes(size: float | None) -> str:
    """Writes a size in MiB whatever its size, so that two runs' states compare at a glance."""
    if size is None:
        return MISSING
    return f"{size / 2**20:,.1f} MiB"
