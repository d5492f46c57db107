"""Several runs in one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from ..files import write_text
from ..table import share_of
from ..units import format_bytes, format_count, format_duration, format_loss, format_perplexity
from .figures import (
    bits_figure,
    gradient_figure,
    learning_rate_figure,
    loss_figures,
    perplexity_figure,
    throughput_figure,
)
from .headline import Headline, headline
from .html import figures, notice, page, section, table
from .memory_figures import memory_bars, memory_timeline
from .runs import Run, RunFolderError, read_run
from .subspace_figures import energy_figure, overlap_figure, refresh_figure

_Figure = Callable[[Headline], float | None]


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Writes one HTML page that holds several runs against each other.

    Args:
        folders: Runs' folders, see `read_run`; the first is what the others are held against.
        output: The file to write.

    Returns:
        `output`.

    Raises:
        RunFolderError: No folder is given, or one cannot be read as a run's.
        MissingExtraError: matplotlib or PyYAML is not installed.
    """
    if not folders:
        raise RunFolderError("no run to compare is given; one folder or more is accepted")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, render_comparison([read_run(folder) for folder in folders]))
    return output


def render_comparison(runs: Sequence[Run]) -> str:
    """Returns the comparison of runs as HTML."""
    names = ", ".join(run.name for run in runs)
    return page(
        f"{names}: comparison",
        [
            f'<header><h1>Comparison of {len(runs)} runs</h1><p class="lead">{escape(names)}</p>'
            "</header>",
            *_warnings(runs),
            section("Final figures", _final_table(runs)),
            section(
                "Learning",
                figures([*loss_figures(runs), perplexity_figure(runs), bits_figure(runs)]),
            ),
            section("Memory", figures([memory_bars(runs), memory_timeline(runs)])),
            section(
                "Optimization",
                figures(
                    [throughput_figure(runs), gradient_figure(runs), learning_rate_figure(runs)]
                ),
            ),
            section(
                "Subspaces",
                figures([energy_figure(runs), overlap_figure(runs), refresh_figure(runs)]),
            ),
        ],
    )


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What makes the runs unfit to be compared."""
    heads = [headline(run) for run in runs]
    texts = []
    for what, values in (
        ("models", {head.model for head in heads}),
        ("data", {head.data for head in heads}),
        ("numbers of tokens", {head.tokens for head in heads}),
    ):
        if len(values) > 1:
            texts.append(f"The runs have different {what}: read the figures with that in mind.")
    unfinished = [run.name for run in runs if not run.finished]
    if unfinished:
        texts.append(f"Not finished: {', '.join(unfinished)}. Their figures are the latest.")
    return [notice(text) for text in texts]


def _final_table(runs: Sequence[Run]) -> str:
    heads = [headline(run) for run in runs]
    # Figure, how it is written, and whether less is better (None: neither is).
    lines: list[tuple[str, _Figure, Callable[[float | None], str], bool | None]] = [
        ("Validation loss", lambda head: head.val_loss, lambda x: format_loss(x, 4), True),
        ("Perplexity", lambda head: head.val_perplexity, format_perplexity, True),
        ("Bits per byte", lambda head: head.bits_per_byte, lambda x: format_loss(x, 4), True),
        ("Optimizer state", lambda head: head.optimizer_state_bytes, format_bytes, True),
        ("Peak memory", lambda head: head.peak_memory_bytes, format_bytes, True),
        ("Tokens per second", lambda head: head.tokens_per_second, format_count, False),
        ("Time", lambda head: head.seconds, format_duration, True),
        ("Steps", lambda head: head.steps, format_count, None),
        ("Tokens", lambda head: head.tokens, format_count, None),
        ("Skipped steps", lambda head: float(head.skipped_steps), format_count, None),
    ]
    rows: list[list[str]] = [["Optimizer", *(head.optimizer for head in heads)]]
    best: list[list[bool]] = [[False] * len(heads)]
    for name, pick, write, less in lines:
        values = [pick(head) for head in heads]
        rows.append([name, *map(write, values)])
        known = [value for value in values if value is not None]
        ranked = less is not None and len(set(known)) > 1
        target = (min(known) if less else max(known)) if ranked else None
        best.append([target is not None and value == target for value in values])
    shares = [share_of(head.optimizer_state_bytes, head.adamw_state_bytes) for head in heads]
    if any(shares):
        rows.insert(5, ["State, share of AdamW's", *(share or "--" for share in shares)])
        best.insert(5, [False] * len(heads))
    return table(rows, head=["", *(run.name for run in runs)], numeric=True, best=best)
