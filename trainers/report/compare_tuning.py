"""What a comparison's search has found and tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from ..compare.results import Results
from ..units import MISSING, format_value
from .html import details, table

_HEAD = ("method", "lr", "plain_lr", "embedding_lr", "head_lr", "betas", "plain_rule", "Loss")


def tuning_table(results: Results) -> str:
    """The settings of each method, and behind them every one that was tried and the grid."""
    if not results.rates:
        return ""
    rows = [
        (*_cells(label, options), str(options.get("tried", MISSING)))
        for label, options in results.rates.items()
    ]
    trials = [
        _cells(label, each)
        for label, options in results.rates.items()
        for each in options.get("trials", ())
    ]
    grid: Mapping[str, Any] = results.about.get("grid") or {}
    declared = [(key, ", ".join(map(format_value, values))) for key, values in grid.items()]
    seed = results.about.get("tuning_seed")
    text = "Settings found by an earlier search." if seed is None else f"Tuned on seed {seed}."
    return (
        table(rows, head=(*_HEAD, "Runs"), numeric=True)
        + f'<p class="lead">{escape(text)}</p>'
        + (_all(trials) if trials else "")
        + (details("The grid", table(declared)) if declared else "")
    )


def _all(trials: list[tuple[str, ...]]) -> str:
    return details(f"All {len(trials):,} that were tried", table(trials, head=_HEAD, numeric=True))


def _cells(label: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    lr = _given(options, "lr", math.nan)
    plain = _given(options, "plain_lr", lr)
    betas = options.get("betas")
    loss = options.get("val_loss")
    return (
        label,
        f"{lr:g}",
        f"{plain:g}",
        *(f"{_given(options, name, plain):g}" for name in ("embedding_lr", "head_lr")),
        "own" if betas is None else format_value(betas),
        str(_given(options, "plain_rule", "own")),
        f"{loss:.4f}" if isinstance(loss, float) else MISSING,
    )


def _given(options: Mapping[str, Any], name: str, default: Any) -> Any:
    """An option; null is what none is."""
    value = options.get(name)
    return default if value is None else value
