"""Figures of a comparison: differences, losses over tokens and seconds, memory and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..compare.memory import CATEGORIES
from ..compare.results import Curve, Results, Row
from ..compare.tables import front
from ..units import format_bytes, format_duration, format_perplexity, format_seconds, format_tick
from .drawing import (
    LIGHT,
    POINT_LIMIT,
    SMALL,
    WIDE,
    Drawing,
    Key,
    label_values,
    new_axes,
    run_colour,
    styled,
    to_svg,
)
from .memory_figures import CATEGORY_COLOURS, category_label
from .series import FloatArray, Series, smoothed, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_CURVES = 10
_ROW_HEIGHT = 0.3  # inches
_SHORT = 180.0  # seconds that are not written as minutes
_LONGEST_NAME = {WIDE[0]: 44, SMALL[0]: 22}


def course_figures(results: Results) -> list[Drawing]:
    """Draws the loss over tokens and over seconds."""
    rows = [row for row in _shown(results) if any(seed.curve for seed in row.seeds)]
    if not rows:
        return []
    left = len(results.ordered) - len(rows)
    some = f" {left} more methods are in the tables only." if left > 0 else ""
    return [
        _course(
            rows,
            "tokens",
            "Loss against tokens (nats per token)",
            "Training loss, smoothed and averaged over the seeds; points are evaluations on the"
            f" validation text.{some}",
        ),
        _course(
            rows,
            "seconds",
            "Loss against time (nats per token)",
            "The same over the time spent in steps, evaluations and checkpoints left out. Runs that"
            " went side by side slow each other down.",
        ),
    ]


def _shown(results: Results) -> list[Row]:
    """The best methods, and the first in any case."""
    ranked = [row for row in results.ordered if row.loss and math.isfinite(row.loss.mean)]
    shown = ranked[:_MOST_CURVES]
    first = results.rows[0] if results.rows else None
    if first in ranked and first not in shown:
        shown.append(first)
    return shown


@styled
def _course(rows: Sequence[Row], axis: str, title: str, caption: str) -> Drawing:
    svgs = []
    keys: list[Key] = []
    for number, size in enumerate((WIDE, SMALL)):
        figure, axes = new_axes(size, steps=False)
        keys = []
        tops = []
        for index, row in enumerate(rows):
            colour, dash, swatch = run_colour(index)
            curves = [seed.curve for seed in row.seeds if seed.curve is not None]
            x, y = _mean_curve(curves, axis)
            axes.plot(x, y, color=LIGHT[colour], linestyle=dash, linewidth=1.3)
            points = _mean_points(curves, axis)
            axes.plot(*points, color=LIGHT[colour], linestyle="none", marker="o", markersize=3.0)
            keys.append(Key(row.entry.label, colour, swatch))
            tops.append(float(y[len(y) // 6]))
        # The fall at the start is the same for all and would press the rest together.
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, max(tops)))
        _label_across(axes, axis)
        label_values(axes, lambda value: f"{value:.4g}")
        svgs.append(to_svg(figure, f"course-{axis}-{number}", f"{title} of {len(rows)} methods."))
    return Drawing(f"course-{axis}", title, svgs[0], tuple(keys), caption, svgs[1])


def _mean_curve(curves: Sequence[Curve], axis: str) -> tuple[FloatArray, FloatArray]:
    count = min(len(curve.loss) for curve in curves)
    x = np.mean([getattr(curve, axis)[:count] for curve in curves], axis=0)
    loss = np.mean([curve.loss[:count] for curve in curves], axis=0)
    series = thinned(smoothed(Series(np.arange(count, dtype=np.int64), loss)), POINT_LIMIT)
    return x[series.steps], series.values


def _mean_points(curves: Sequence[Curve], axis: str) -> tuple[FloatArray, FloatArray]:
    count = min(len(curve.val_loss) for curve in curves)
    x = np.mean([getattr(curve, f"val_{axis}")[:count] for curve in curves], axis=0)
    return x, np.mean([curve.val_loss[:count] for curve in curves], axis=0)


def _label_across(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    write: Callable[[float], str] = format_tick if axis == "tokens" else format_duration
    if axis == "seconds" and axes.get_xlim()[1] < _SHORT:
        write = format_seconds
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(max(value, 0.0))))
    axes.set_xlabel("tokens" if axis == "tokens" else "time in steps")


@styled
def plane_figure(results: Results) -> Drawing | None:
    """Draws perplexity against the bytes of weights and state, with the Pareto front."""
    places = {row.entry.label: place for place, row in enumerate(results.ordered, start=1)}
    points = []
    for row in results.ordered:
        quality = results.fair(row, "perplexity")
        if row.held is not None and quality is not None and math.isfinite(quality.mean):
            points.append((row, row.held, quality))
    if not points:
        return None
    best = front(results)
    svgs = []
    for number, size in enumerate(((WIDE[0], 3.8), (SMALL[0], 3.4))):
        figure, axes = new_axes(size, steps=False)
        ordered = [
            (x, y.mean) for label in best for row, x, y in points if row.entry.label == label
        ]
        axes.plot(*zip(*ordered, strict=True), color=LIGHT["blue"], linewidth=1.2, linestyle="--")
        for row, x, y in points:
            colour = _plane_colour(row, results, best)
            axes.errorbar(
                x,
                y.mean,
                yerr=y.error,
                color=LIGHT[colour],
                marker="o",
                markersize=4.5,
                linewidth=0.9,
            )
            axes.annotate(
                str(places[row.entry.label]),
                (x, y.mean),
                xytext=(5, 3),
                textcoords="offset points",
                color=LIGHT["ink"],
            )
        axes.margins(x=0.06, y=0.1)
        label_values(axes, format_perplexity)
        _label_sizes(axes, 4 if number else 8)
        axes.set_xlabel("weights and optimizer state")
        described = ", ".join(
            f"{row.entry.label} {format_bytes(x)} {format_perplexity(y.mean)}"
            for row, x, y in points
        )
        svgs.append(to_svg(figure, f"plane-{number}", f"Perplexity by memory: {described}."))
    keys = (
        Key("Pareto front", "blue", "dashed"),
        Key("on the front", "blue", "point"),
        Key(f"first method, {results.rows[0].entry.label}", "orange", "point"),
        Key("others", "slate", "point"),
    )
    caption = (
        "Numbers are places in the table of results; bars are standard errors over the seeds that"
        " all methods have finished. On the front no other method is as good in both."
    )
    return Drawing("plane", "Memory and perplexity", svgs[0], keys, caption, svgs[1])


def _label_sizes(axes: Axes, count: int) -> None:
    """Puts the horizontal axis's ticks at round binary sizes."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = axes.get_xlim()
    unit = 1024.0 ** int(math.log(max(high, 1.0), 1024))
    name = format_bytes(unit).split()[1]
    ticks = np.asarray(MaxNLocator(nbins=count).tick_values(low / unit, high / unit)) * unit
    axes.xaxis.set_major_locator(FixedLocator(ticks[(ticks >= low) & (ticks <= high)].tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / unit:.4g} {name}"))


def _plane_colour(row: Row, results: Results, best: Sequence[str]) -> str:
    if row is results.rows[0]:
        return "orange"
    return "blue" if row.entry.label in best else "slate"


@styled
def difference_figure(results: Results) -> Drawing | None:
    """Draws each method's paired difference to the first one, with its standard error."""
    rows = [row for row in results.ordered if row.against is not None]
    if not rows:
        return None
    first = results.rows[0].entry.label
    svgs = []
    for number, width in enumerate((WIDE[0], SMALL[0])):
        figure, axes, places = _rows_axes([row.entry.label for row in rows], width)
        for row, place in zip(rows, places, strict=True):
            assert row.against is not None
            colour = "green" if row.against.mean < 0 else "orange"
            axes.errorbar(
                row.against.mean,
                place,
                xerr=row.against.error,
                color=LIGHT[colour],
                marker="o",
                markersize=4.0,
                linewidth=1.2,
            )
        axes.axvline(0, color=LIGHT["muted"], linewidth=1.0)
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(f"nats per token less {_short(first, width)}'s")
        described = ", ".join(
            f"{row.entry.label} {row.against.mean:+.4f}" for row in rows if row.against is not None
        )
        svgs.append(to_svg(figure, f"difference-{number}", f"Differences to {first}: {described}."))
    keys = (Key(f"better than {first}", "green", "point"), Key("worse", "orange", "point"))
    return Drawing(
        "difference",
        f"Validation loss less {first}'s",
        svgs[0],
        keys,
        "Differences are taken seed by seed, so that a seed that is hard for all doesn't blur them;"
        " bars are their standard errors.",
        svgs[1],
    )


@styled
def memory_figure(results: Results) -> Drawing | None:
    """Draws each method's measured memory by category, and what was predicted of it."""
    rows = [row for row in results.ordered if row.held is not None]
    if not rows:
        return None
    svgs = []
    for number, width in enumerate((WIDE[0], SMALL[0])):
        figure, axes, places = _rows_axes([row.entry.label for row in rows], width)
        for row, place in zip(rows, places, strict=True):
            left = 0.0
            for category in CATEGORIES:
                size = row.measured(category) or 0.0
                colour = LIGHT[CATEGORY_COLOURS[category]]
                axes.barh(place, size, left=left, height=0.62, color=colour, edgecolor="none")
                left += size
            if len(row.predicted) == len(CATEGORIES):
                expected = sum(row.predicted.values())
                axes.plot([expected] * 2, [place - 0.42, place + 0.42], color=LIGHT["ink"])
            axes.annotate(
                format_bytes(left),
                (left, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xlim(0, axes.get_xlim()[1] * 1.22)
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        svgs.append(
            to_svg(figure, f"memory-{number}", "Memory by method; the table has the figures.")
        )
    keys = [Key(category_label(name), CATEGORY_COLOURS[name], "area") for name in CATEGORIES]
    return Drawing(
        "memory",
        "Memory by category",
        svgs[0],
        (*keys, Key("predicted", "ink")),
        "Measured, the largest of each category during the run. The mark is the sum predicted from"
        " shapes alone; official packages have none.",
        svgs[1],
    )


def _rows_axes(labels: Sequence[str], width: float) -> tuple[Figure, Axes, list[float]]:
    """Axes with a named row for each label, the first at the top."""
    figure, axes = new_axes((width, max(0.7 + _ROW_HEIGHT * len(labels), 1.4)), steps=False)
    places = [float(place) for place in range(len(labels))][::-1]
    axes.set_yticks(places, [_short(label, width) for label in labels])
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.grid(visible=False, axis="y")
    return figure, axes, places


def _short(label: str, width: float) -> str:
    limit = _LONGEST_NAME[width]
    return label if len(label) <= limit else f"{label[: limit - 3]}..."
