"""A chart of what each method takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..missing import require
from .result import CATEGORIES, PHASES, Plan

_FORMS = (".png", ".svg", ".pdf")
_GB = 1e9


def check_place(path: Path) -> None:
    """Raises `ValueError` for a chart's file that can't be written or is of another kind."""
    if path.suffix.lower() not in _FORMS:
        raise ValueError(f"--plot {path}: accepted are files that end in {', '.join(_FORMS)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")


def chart(plans: Sequence[Plan], path: Path) -> None:
    """Writes a bar for each plan: bytes by category at its highest moment.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.5 + 0.28 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highest = [plan.phases[max(PHASES, key=lambda name: plan.peaks[name])] for plan in plans]
    labels = [plan.optimizer for plan in plans]
    left = [0.0] * len(plans)
    for number, kind in enumerate(CATEGORIES):
        sizes = [parts[kind] / _GB for parts in highest]
        if any(sizes):
            axes.barh(labels, sizes, left=left, label=kind, color=f"C{number}")
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    memory = plans[0].memory
    if memory is not None:
        axes.axvline(memory / _GB, color="black", linestyle="--", linewidth=1, label="memory")
    axes.invert_yaxis()
    axes.set_xlabel("GB of tensors at the peak of a step")
    axes.set_title(
        f"{plans[0].model}, {plans[0].setting['batch']} x {plans[0].setting['sequence']} tokens"
    )
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
