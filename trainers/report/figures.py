"""How training went: loss, perplexity, learning rate, gradient norm, throughput.

Each function draws one figure of one run or of several, or returns None where there is nothing to
draw. One run shows its raw curve, its smoothed one and its evaluations; several show one each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..units import format_count, format_loss, format_perplexity, format_tick, perplexity
from .drawing import (
    LIGHT,
    SMALL,
    WIDE,
    Drawing,
    Key,
    draw_curve,
    label_values,
    new_axes,
    run_colour,
    start_at_zero,
    styled,
    thinning_note,
    to_svg,
)
from .headline import headline
from .runs import Run
from .series import Series, smoothed, smoothing_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_EVENT_LINES = 40  # more vertical lines than this hide the curve
_LOG_SPREAD = 30.0  # a largest value this many times the median asks for a logarithmic axis


def loss_figures(runs: Sequence[Run]) -> list[Drawing]:
    """Draws the loss over the whole run and, where there is enough of it, over its second half."""
    if not any(len(run.loss) or len(run.val_loss) for run in runs):
        return []
    drawings = [
        _loss(
            runs,
            key="loss",
            title="Loss (nats per token)",
            sizes=(WIDE, SMALL),
            since=0,
            caption=_loss_caption(runs),
        )
    ]
    last = max((int(run.loss.steps[-1]) for run in runs if len(run.loss)), default=0)
    if last >= 50:
        drawings.append(
            _loss(
                runs,
                key="loss-late",
                title="Loss, second half (nats per token)",
                sizes=(SMALL,),
                since=last // 2,
                caption="The same curves from the middle of the run on, on a scale of their own: "
                "still falling means that more steps would help.",
            )
        )
    return drawings


@styled
def _loss(
    runs: Sequence[Run],
    *,
    key: str,
    title: str,
    sizes: Sequence[tuple[float, float]],
    since: int,
    caption: str,
) -> Drawing:
    keys: list[Key] = []
    svgs: list[str] = []
    for number, size in enumerate(sizes):
        figure, axes = new_axes(size)
        keys = []
        for index, run in enumerate(runs):
            raw, evaluated = run.loss.since(since), run.val_loss.since(since)
            curve = smoothed(run.loss).since(since)
            if len(runs) == 1:
                draw_curve(axes, raw, "blue", faint=True)
                draw_curve(axes, curve, "blue")
                draw_curve(axes, evaluated, "orange", points=True)
                window = smoothing_window(len(run.loss))
                keys += [Key("training, each step", "blue", "faint")] if len(raw) else []
                keys += [Key(f"training, over up to {window} steps", "blue")] if len(raw) else []
                keys += [Key("validation", "orange", "point")] if len(evaluated) else []
            else:
                colour, dash, swatch = run_colour(index)
                draw_curve(axes, curve, colour, dash=dash)
                draw_curve(axes, evaluated, colour, points=True, dash="none")
                keys.append(Key(run.name, colour, swatch))
        if since == 0:
            for mark in sorted(_unigram_marks(runs)):
                axes.axhline(mark, color=LIGHT["muted"], linewidth=1.1, linestyle=(0, (5, 3)))
                keys.append(Key(f"unigram mark, {mark:.3f}", "muted", "dashed"))
            keys += _draw_events(axes, runs) if len(runs) == 1 else []
        label_values(axes, lambda value: f"{value:.4g}")
        svgs.append(to_svg(figure, f"{key}-{number}", _loss_description(runs, title)))
    narrow = svgs[1] if len(svgs) > 1 else ""
    return Drawing(key, title, svgs[0], tuple(keys), caption, narrow)


def _draw_events(axes: Axes, runs: Sequence[Run]) -> list[Key]:
    """Marks a method's events: by vertical lines, by ticks at the bottom where they are many."""
    events = [event for run in runs for event in run.events]
    if not events:
        return []
    steps = sorted({event.step for event in events})
    names = ", ".join(sorted({event.name for event in events}))
    if len(steps) <= _MAX_EVENT_LINES:
        for step in steps:
            axes.axvline(step, color=LIGHT["purple"], linewidth=0.9, linestyle=(0, (1, 2)))
        return [Key(names, "purple", "dotted")]
    heights = np.full(len(steps), 0.015)
    axes.plot(
        steps,
        heights,
        linestyle="none",
        marker="|",
        markersize=5,
        color=LIGHT["purple"],
        transform=axes.get_xaxis_transform(),
    )
    return [Key(names, "purple", "point")]


def _unigram_marks(runs: Sequence[Run]) -> set[float]:
    marks = (headline(run).unigram_val_loss for run in runs)
    return {round(mark, 3) for mark in marks if mark is not None}


def _loss_caption(runs: Sequence[Run]) -> str:
    text = (
        ""
        if len(runs) == 1
        else "Lines are the smoothed training loss, points the validation loss. "
    )
    text += (
        "Lower is better. Training loss is measured on each step's batch before its update, "
        "validation loss on the same held-out text every time; a validation loss that rises while "
        "the training loss falls means that the model learns its training text by heart."
    )
    if any(_unigram_marks([run]) for run in runs):
        text += (
            " The unigram mark is what guessing each token by its frequency alone would score: "
            "a model below it has learned from context."
        )
    if any(run.events for run in runs) and len(runs) == 1:
        text += " Vertical marks are the method's own events, listed below."
    return text + thinning_note([run.loss for run in runs])


def _loss_description(runs: Sequence[Run], title: str) -> str:
    parts = []
    for run in runs:
        figures = headline(run)
        name = "validation loss" if len(runs) == 1 else f"{run.name}: validation loss"
        parts.append(
            f"{name} from {format_loss(figures.initial_val_loss)} "
            f"to {format_loss(figures.val_loss)}"
        )
    return f"{title}: {'; '.join(parts)}."


@styled
def perplexity_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws perplexity, of the smoothed training loss and of each evaluation, logarithmically."""
    if not any(len(run.loss) or len(run.val_loss) for run in runs):
        return None
    figure, axes = new_axes(SMALL)
    keys: list[Key] = []
    for index, run in enumerate(runs):
        training, evaluated = _exponential(smoothed(run.loss)), _exponential(run.val_loss)
        if len(runs) == 1:
            draw_curve(axes, training, "blue")
            draw_curve(axes, evaluated, "orange", points=True)
            keys += [Key("training, smoothed", "blue")] if len(training) else []
            keys += [Key("validation", "orange", "point")] if len(evaluated) else []
        else:
            colour, dash, swatch = run_colour(index)
            draw_curve(axes, evaluated, colour, points=True, dash=dash)
            keys.append(Key(run.name, colour, swatch))
    label_values(axes, format_tick, log=True)
    ends = ", ".join(format_perplexity(headline(run).val_perplexity) for run in runs)
    return Drawing(
        "perplexity",
        "Perplexity",
        to_svg(figure, "perplexity", f"Perplexity on a logarithmic scale, at the end {ends}."),
        tuple(keys),
        "The exponential of the loss: among how many equally likely tokens the model is left "
        "to choose. The scale is logarithmic. It depends on the tokenizer; bits per byte do not.",
    )


def _exponential(series: Series) -> Series:
    values = np.array([perplexity(value) for value in series.values.tolist()], dtype=np.float64)
    return series.mapped(values)


@styled
def bits_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws the validation text's bits per byte."""
    ends = [run.bits_per_byte.last for run in runs if len(run.bits_per_byte)]
    return _simple_figure(
        runs,
        lambda run: run.bits_per_byte,
        key="bits",
        title="Bits per byte of the validation text",
        write=lambda value: f"{value:.3g}",
        colour="orange",
        points=True,
        caption="The loss in bits, spread over the bytes of the text instead of its tokens. Runs "
        "with different tokenizers can be compared by it.",
        description=f"Bits per byte, at the end {', '.join(format_loss(end) for end in ends)}.",
    )


@styled
def learning_rate_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws the learning rate."""
    peaks = [run.learning_rate.highest or 0.0 for run in runs if len(run.learning_rate)]
    return _simple_figure(
        runs,
        lambda run: run.learning_rate,
        key="learning-rate",
        title="Learning rate",
        write=lambda value: f"{value:.3g}",
        colour="green",
        caption="The schedule as it was applied, step by step.",
        description=f"Learning rate, at most {', '.join(f'{peak:.3g}' for peak in peaks)}.",
    )


@styled
def throughput_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws tokens per second."""
    ends = [headline(run).tokens_per_second for run in runs]
    return _simple_figure(
        runs,
        lambda run: run.tokens_per_second,
        key="throughput",
        title="Throughput (tokens per second)",
        write=format_tick,
        colour="green",
        noisy=True,
        caption="Dips are steps that did more than train: a refresh of the subspaces, a checkpoint "
        "or other work on the machine.",
        description=f"Tokens per second, overall {', '.join(map(format_count, ends))}.",
    )


@styled
def gradient_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws the gradient's norm, and marks the skipped steps of a single run."""
    series = [run.gradient_norm for run in runs]
    if not any(map(len, series)) and not any(run.skips for run in runs):
        return None
    figure, axes = new_axes(SMALL)
    keys: list[Key] = []
    for index, run in enumerate(runs):
        if len(runs) == 1:
            draw_curve(axes, run.gradient_norm, "blue", faint=True)
            draw_curve(axes, smoothed(run.gradient_norm), "blue")
            keys += [Key("each step", "blue", "faint"), Key("smoothed", "blue")]
        else:
            colour, dash, swatch = run_colour(index)
            draw_curve(axes, smoothed(run.gradient_norm), colour, dash=dash)
            keys += [Key(run.name, colour, swatch)] if len(run.gradient_norm) else []
    skips = [skip for run in runs for skip in run.skips]
    if skips:
        axes.plot(
            [skip.step for skip in skips],
            [0.97] * len(skips),
            linestyle="none",
            marker="x",
            markersize=5,
            markeredgewidth=1.4,
            color=LIGHT["orange"],
            transform=axes.get_xaxis_transform(),
        )
        keys.append(Key(f"skipped steps, {len(skips)}", "orange", "point"))
    values = np.concatenate([one.values for one in series])
    positive = values[values > 0]
    spread = len(positive) > 0 and positive.max() > _LOG_SPREAD * float(np.median(positive))
    label_values(axes, lambda value: f"{value:.3g}", log=bool(spread))
    scale = " The scale is logarithmic." if spread else ""
    return Drawing(
        "gradient",
        "Gradient norm, before clipping",
        to_svg(
            figure,
            "gradient",
            f"Norm of the gradient over the steps; {len(skips)} steps were skipped.",
        ),
        tuple(keys),
        "A calm curve is a healthy one; spikes that grow towards the end point to a learning rate "
        "that is too high. A skipped step (marked at the top) is one whose loss or gradient was "
        f"not finite or far out of line: its update was left out.{scale}",
    )


def _simple_figure(
    runs: Sequence[Run],
    pick: Callable[[Run], Series],
    *,
    key: str,
    title: str,
    write: Callable[[float], str],
    colour: str,
    caption: str,
    description: str,
    points: bool = False,
    noisy: bool = False,
) -> Drawing | None:
    """Draws one series of each run; noisy ones are smoothed and start their axis at zero."""
    series = [pick(run) for run in runs]
    if not any(map(len, series)):
        return None
    figure, axes = new_axes(SMALL)
    keys: list[Key] = []
    for index, (run, one) in enumerate(zip(runs, series, strict=True)):
        if not len(one):
            continue
        shade, dash, swatch = run_colour(index)
        shade = colour if len(runs) == 1 else shade
        if noisy and len(runs) == 1:
            draw_curve(axes, one, shade, faint=True)
        draw_curve(axes, smoothed(one) if noisy else one, shade, points=points, dash=dash)
        if len(runs) > 1:
            keys.append(Key(run.name, shade, swatch))
        elif noisy:
            keys += [Key("each step", shade, "faint"), Key("smoothed", shade)]
    if noisy:
        start_at_zero(axes, max(one.highest or 0.0 for one in series))
    label_values(axes, write)
    return Drawing(key, title, to_svg(figure, key, description), tuple(keys), caption)
