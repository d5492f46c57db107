"""A run's memory: by category compared with AdamW, and over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..units import format_bytes
from .drawing import (
    HALF,
    LIGHT,
    Drawing,
    Key,
    draw_curve,
    label_bytes,
    new_axes,
    run_colour,
    start_at_zero,
    styled,
    to_svg,
)
from .headline import headline, memory_categories
from .runs import MEMORY_CATEGORIES, Run

CATEGORY_COLOURS = {
    "weights": "slate",
    "gradients": "gold",
    "moments": "blue",
    "basis": "green",
    "other_state": "purple",
}
_LABELS = {"other_state": "other state"}
_ROW_HEIGHT = 0.42  # inches


@styled
def memory_bars(runs: Sequence[Run]) -> Drawing | None:
    """Draws what each run's memory is made of as one bar, and AdamW's for the same weights."""
    rows = [(run.name if len(runs) > 1 else "this run", memory_categories(run)) for run in runs]
    rows = [(name, sizes) for name, sizes in rows if sizes]
    if not rows:
        return None
    expected = _adamw(runs)
    if expected:
        rows.append(("AdamW, expected", expected))
    figure, axes = new_axes((HALF[0], max(0.75 + _ROW_HEIGHT * len(rows), 1.6)), steps=False)
    positions = np.arange(len(rows))[::-1]
    used: set[str] = set()
    for (_, sizes), position in zip(rows, positions.tolist(), strict=True):
        left = 0.0
        for category in MEMORY_CATEGORIES:
            size = sizes.get(category, 0.0)
            if size <= 0:
                continue
            axes.barh(
                position,
                size,
                left=left,
                height=0.62,
                color=LIGHT[CATEGORY_COLOURS[category]],
                edgecolor="none",
            )
            left += size
            used.add(category)
        axes.annotate(
            format_bytes(left),
            (left, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=LIGHT["ink"],
        )
    totals = [sum(sizes.values()) for _, sizes in rows]
    axes.set_xlim(0, max(totals) * 1.24)
    axes.set_yticks(positions, [_short(name) for name, _ in rows])
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    described = "; ".join(
        f"{name}: "
        + ", ".join(f"{category_label(key)} {format_bytes(size)}" for key, size in sizes.items())
        for name, sizes in rows
    )
    caption = "The largest size of each category during the run."
    if expected:
        caption += (
            " AdamW's bar has the same weights and gradients and, by formula, its two full-size "
            "moments."
        )
    return Drawing(
        "memory-bars",
        "Memory by category",
        to_svg(figure, "memory-bars", f"Memory by category. {described}."),
        tuple(
            Key(category_label(name), CATEGORY_COLOURS[name], "area")
            for name in MEMORY_CATEGORIES
            if name in used
        ),
        caption,
    )


@styled
def memory_timeline(runs: Sequence[Run]) -> Drawing | None:
    """Draws the process's memory over time, above the categories that a single run accounts for."""
    if not any(len(run.memory["process"]) or len(run.memory["peak"]) for run in runs):
        return None
    figure, axes = new_axes(HALF)
    keys: list[Key] = []
    for index, run in enumerate(runs):
        process, peak = run.memory["process"], run.memory["peak"]
        if len(runs) == 1:
            accounted = sum(memory_categories(run).values())
            if accounted:
                axes.axhspan(0, accounted, color=LIGHT["slate"], alpha=0.35, linewidth=0)
                keys.append(Key("the categories together", "slate", "area"))
            draw_curve(axes, process, "blue")
            draw_curve(axes, peak, "orange", dash="--")
            keys += [Key("process", "blue")] if len(process) else []
            keys += [Key("highest so far", "orange", "dashed")] if len(peak) else []
        else:
            colour, dash, swatch = run_colour(index)
            shown = process if len(process) else peak
            draw_curve(axes, shown, colour, dash=dash)
            keys += [Key(run.name, colour, swatch)] if len(shown) else []
    tops = (run.memory[key].highest or 0.0 for run in runs for key in ("process", "peak"))
    start_at_zero(axes, max(tops))
    label_bytes(axes)
    peaks = ", ".join(format_bytes(headline(run).peak_memory_bytes) for run in runs)
    return Drawing(
        "memory-timeline",
        "Memory of the whole process",
        to_svg(figure, "memory-timeline", f"Memory of the process over time; peak {peaks}."),
        tuple(keys),
        "Measured from outside: beyond the categories it holds activations, the batch, and Python "
        "with its libraries. It should be flat after the first steps.",
    )


def _adamw(runs: Sequence[Run]) -> dict[str, float]:
    """AdamW's expected memory for the first run's model; empty where its state is unknown."""
    sizes = memory_categories(runs[0])
    state = headline(runs[0]).adamw_state_bytes
    if state is None or "weights" not in sizes:
        return {}
    expected = {key: size for key, size in sizes.items() if key in ("weights", "gradients")}
    expected["moments"] = state
    return expected


def category_label(category: str) -> str:
    """What a category of memory is called."""
    return _LABELS.get(category, category)


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 3] + "..."
