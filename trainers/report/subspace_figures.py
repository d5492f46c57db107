"""Figures of the subspaces of a low-rank method at each refresh."""

from __future__ import annotations

from collections.abc import Sequence

from ..units import format_seconds, format_tick
from .drawing import (
    SMALL,
    Drawing,
    Key,
    draw_curve,
    label_values,
    new_axes,
    run_colour,
    span_steps,
    start_at_zero,
    styled,
    to_svg,
)
from .runs import Run


@styled
def energy_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws the share of the gradient's energy that the new bases capture."""
    series = [run.captured_energy for run in runs]
    if not any(map(len, series)):
        return None
    figure, axes = new_axes(SMALL)
    keys: list[Key] = []
    for index, run in enumerate(runs):
        colour, dash, swatch = run_colour(index)
        draw_curve(axes, run.captured_energy, colour, points=True, dash=dash)
        if len(runs) == 1:
            keys.append(Key("mean over the matrices", colour, "line"))
            draw_curve(axes, run.captured_energy_min, "orange", points=True, dash="--")
            if len(run.captured_energy_min):
                keys.append(Key("worst matrix", "orange", "dashed"))
        elif len(run.captured_energy):
            keys.append(Key(run.name, colour, swatch))
    axes.set_ylim(0, 1.02)
    span_steps(axes, _last_step(runs))
    label_values(axes, _percent)
    ends = ", ".join(_percent(one.last) for one in series if one.last is not None)
    return Drawing(
        "energy",
        "Captured energy at each refresh",
        to_svg(figure, "energy", f"Share of the gradient's energy captured, at the end {ends}."),
        tuple(keys),
        "How much of the gradient (its squared norm) lies inside the new subspace. Near 100%, the "
        "rank could be smaller; low, and most of the gradient is thrown away or left to the "
        "method's residual.",
    )


@styled
def overlap_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws how far each new basis spans the same space as the one before."""
    series = [run.overlap for run in runs]
    if not any(map(len, series)):
        return None
    figure, axes = new_axes(SMALL)
    keys: list[Key] = []
    for index, run in enumerate(runs):
        colour, dash, swatch = run_colour(index)
        draw_curve(axes, run.overlap, "green" if len(runs) == 1 else colour, points=True, dash=dash)
        keys += [Key(run.name, colour, swatch)] if len(runs) > 1 and len(run.overlap) else []
    axes.set_ylim(0, 1.02)
    span_steps(axes, _last_step(runs))
    label_values(axes, _percent)
    ends = ", ".join(_percent(one.last) for one in series if one.last is not None)
    return Drawing(
        "overlap",
        "Overlap with the former basis",
        to_svg(figure, "overlap", f"Mean squared cosine with the former basis, at the end {ends}."),
        tuple(keys),
        "100%: the refresh found the same subspace again, and could be done less often. Low: the "
        "gradients have moved on, or the basis mostly follows the noise of one batch.",
    )


@styled
def refresh_figure(runs: Sequence[Run]) -> Drawing | None:
    """Draws the time of each refresh."""
    series = [run.refresh_seconds for run in runs]
    if not any(map(len, series)):
        return None
    figure, axes = new_axes(SMALL)
    keys: list[Key] = []
    for index, run in enumerate(runs):
        colour, dash, swatch = run_colour(index)
        shade = "purple" if len(runs) == 1 else colour
        draw_curve(axes, run.refresh_seconds, shade, points=True, dash=dash)
        several = len(runs) > 1 and len(run.refresh_seconds) > 0
        keys += [Key(run.name, colour, swatch)] if several else []
    start_at_zero(axes, max(one.highest or 0.0 for one in series))
    span_steps(axes, _last_step(runs))
    if max(one.highest or 0.0 for one in series) < 1:
        label_values(axes, lambda seconds: f"{format_tick(1000 * seconds)} ms")
    else:
        label_values(axes, lambda seconds: f"{format_tick(seconds)} s")
    totals = [float(one.values.sum()) for one in series if len(one)]
    total = ", ".join(format_seconds(seconds) for seconds in totals)
    return Drawing(
        "refresh",
        "Time of each refresh",
        to_svg(figure, "refresh", f"Seconds of each refresh; together {total}."),
        tuple(keys),
        f"Time to compute new bases for all matrices due at that step; together {total}.",
    )


def _last_step(runs: Sequence[Run]) -> int:
    series = [one for run in runs for one in (run.loss, run.captured_energy)]
    return max((int(one.steps[-1]) for one in series if len(one)), default=1)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share in (0, 1) or share >= 0.1 else f"{100 * share:.1f}%"
