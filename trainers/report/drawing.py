"""From axes to a figure in the page: SVG that takes its colours and its font from the page.

matplotlib draws with the light palette; the SVG's colours are then replaced by CSS variables, so
that one figure is right in light and in dark and its text can be read aloud, searched and copied.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from ..missing import require
from ..units import format_bytes, format_tick
from .series import Series, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

WIDE = (9.6, 3.1)
"""Size in inches of a figure across the page."""
HALF = (4.7, 2.5)
"""Size in inches of a figure in one of two columns."""
SMALL = (3.9, 2.4)
"""Size in inches of a figure in one of three columns, and of the wide ones on a phone."""
POINT_LIMIT = 800
"""Points drawn of one curve; longer ones are thinned."""

# Each value is the colour in light mode; it must occur once, because the SVG's colours are
# mapped back to their names. Hues: Okabe and Ito's, which the colour-blind can tell apart,
# darkened until each has a contrast of 3:1 or more on white.
LIGHT = {
    "ink": "#23272e",
    "muted": "#666d78",
    "grid": "#e3e5e9",
    "blue": "#0a66ad",
    "orange": "#c4500c",
    "green": "#067a5b",
    "purple": "#8c4a8e",
    "gold": "#ab7b00",
    "slate": "#6b7c8f",
}
DARK = {
    "ink": "#e4e7ec",
    "muted": "#9aa2ae",
    "grid": "#31363f",
    "blue": "#62b1f0",
    "orange": "#f28e4e",
    "green": "#43c39c",
    "purple": "#d193d4",
    "gold": "#dcb340",
    "slate": "#93a4b7",
}
RUN_COLOURS = ("blue", "orange", "green", "purple", "gold", "slate")
"""Colours of several runs in one figure, in this order and then again."""
RUN_DASHES: tuple[str, ...] = ("-", "--", ":", "-.")
"""Line styles of several runs: the next one each time the colours are used up."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowrank",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.linewidth": 0.7,
    "axes.edgecolor": LIGHT["grid"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.015,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 4.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}

Swatch = Literal["line", "faint", "dashed", "dotted", "dashdot", "point", "area"]


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend.

    Attributes:
        label: What the curve is.
        colour: A name of the palette.
        swatch: How the curve is drawn.
    """

    label: str
    colour: str
    swatch: Swatch = "line"


@dataclass(frozen=True)
class Drawing:
    """A figure, ready for the page.

    Attributes:
        key: Names the figure in the page; letters, digits and hyphens.
        title: What is drawn, with its unit.
        svg: The inline SVG.
        narrow_svg: The same figure for a narrow screen, "" where `svg` serves both.
        keys: The legend.
        caption: How to read it, in plain words.
    """

    key: str
    title: str
    svg: str
    keys: tuple[Key, ...]
    caption: str
    narrow_svg: str = ""


def styled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Lets a function draw in the report's style, whatever the reader's own settings are."""

    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with _style():
            return function(*args, **kwargs)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    return wrapper


@contextmanager
def _style() -> Iterator[None]:
    matplotlib = require("matplotlib", "train")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_axes(size: tuple[float, float], *, steps: bool = True) -> tuple[Figure, Axes]:
    """Makes an empty figure.

    Args:
        size: Width and height in inches.
        steps: Whether the horizontal axis counts optimizer steps.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
    axes = figure.add_subplot()
    if steps:
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=round(size[0] * 1.4), integer=True, steps=[1, 2, 5, 10])
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: format_tick(step)))
        axes.set_xlabel("step")
    return figure, axes


def label_values(axes: Axes, write: Callable[[float], str], *, log: bool = False) -> None:
    """Sets how the vertical axis writes its values.

    Args:
        axes: To be changed.
        write: Turns a value into text.
        log: Whether to make the axis logarithmic.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def start_at_zero(axes: Axes, highest: float) -> None:
    """Lets the vertical axis begin at zero and end a little above `highest`."""
    axes.set_ylim(0, highest * 1.08 if highest > 0 else 1.0)


def span_steps(axes: Axes, last: int) -> None:
    """Lets the horizontal axis cover all steps up to `last`, however few of them have a point."""
    margin = 0.015 * max(last, 1)
    axes.set_xlim(-margin, last + margin)


def label_bytes(axes: Axes) -> None:
    """Puts the vertical axis's ticks at round binary sizes; the axis starts at zero."""
    from matplotlib.ticker import FixedLocator

    highest = axes.get_ylim()[1]
    unit = 1024.0 ** max(int(math.log(max(highest, 1.0), 1024)), 0)
    choices = [unit * nice * scale for scale in (0.1, 1, 10, 100) for nice in (1, 2, 2.5, 5)]
    step = next((one for one in choices if highest / one <= 5), choices[-1])
    label_values(axes, lambda value: "0" if value == 0 else _round_size(value, unit))
    axes.yaxis.set_major_locator(FixedLocator([step * n for n in range(int(highest / step) + 1)]))


def _round_size(size: float, unit: float) -> str:
    name = format_bytes(unit).split()[1]
    return f"{size / unit:.4g} {name}"


def draw_curve(
    axes: Axes,
    series: Series,
    colour: str,
    *,
    faint: bool = False,
    points: bool = False,
    dash: str = "-",
) -> None:
    """Draws one series, thinned where it is long.

    Args:
        axes: To draw on.
        series: What to draw; nothing is drawn of an empty one.
        colour: A name of the palette.
        faint: Draws it in the background.
        points: Marks each point; a single point is always marked.
        dash: matplotlib's line style.
    """
    if not len(series):
        return
    shown = thinned(series, POINT_LIMIT)
    axes.plot(
        shown.steps,
        shown.values,
        color=LIGHT[colour],
        alpha=0.3 if faint else 1.0,
        # Between evaluations nothing is known: their line only leads the eye.
        linewidth=0.8 if faint else (1.0 if points else None),
        linestyle=dash,
        marker="o" if (points and len(shown) <= 60) or len(shown) == 1 else None,
        zorder=1.5 if faint else 2.5,
    )


def run_colour(index: int) -> tuple[str, str, Swatch]:
    """The colour, the line style and the legend's swatch of the run at `index`."""
    swatches: tuple[Swatch, ...] = ("line", "dashed", "dotted", "dashdot")
    turn = index // len(RUN_COLOURS) % len(RUN_DASHES)
    return RUN_COLOURS[index % len(RUN_COLOURS)], RUN_DASHES[turn], swatches[turn]


def thinning_note(series: Sequence[Series]) -> str:
    """The sentence that owns up to thinning, "" where every point is drawn."""
    longest = max((len(one) for one in series), default=0)
    if longest <= POINT_LIMIT:
        return ""
    return (
        f" Long curves are thinned, in all figures: of {longest:,} points at most {POINT_LIMIT} "
        "are drawn, the smallest and the largest of each stretch, so that no spike is lost."
    )


def to_svg(figure: Figure, key: str, description: str) -> str:
    """Turns a figure into SVG for the page.

    Args:
        figure: Drawn in the report's style.
        key: Unique in the page; goes before every id.
        description: What the figure shows, for those who can't see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    if view_box is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{key}-', body)
    body = re.sub(r"url\(#", f"url(#{key}-", body)
    # A name of a variable in place of the colour: the page decides, for light and for dark.
    names = {colour: name for name, colour in LIGHT.items()}
    body = re.sub(
        r"#[0-9a-f]{6}\b",
        lambda match: f"var(--{names[match[0]]})" if match[0] in names else match[0],
        body,
    )
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {view_box[0]} role="img" '
        f'aria-labelledby="{key}-description"><title id="{key}-description">'
        f"{escape(description)}</title>{body.rstrip()}"
    )
