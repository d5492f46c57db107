"""Settings found before, read from a file, and a search of `lr` around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .entries import Entry
from .plan import FOUND, Run
from .pool import Outcome, Say
from .tuning import trial

#: Factors of lr that are tried, and how many at most: further ones follow while the best lies at an
#: end.
FACTORS, MOST = (0.5, 1.0, 2.0), 5


def read_rates(path: Path) -> dict[str, dict[str, Any]]:
    """Settings found before: a comparison's folder, its results.json, or a file of rates.

    Returns:
        Optimizer settings by label.

    Raises:
        ValueError: there is no such file, or it holds none.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text("utf-8"))
        rates = content["rates"]
        return {
            str(label): {k: v for k, v in options.items() if k not in FOUND}
            for label, options in rates.items()
        }
    except FileNotFoundError:
        raise ValueError(f"--rates {path}: {file} doesn't exist") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--rates {path}: {file} holds no rates ({error!r}); --tune finds some"
        ) from None


def refine(
    entries: Sequence[Entry],
    rates: Mapping[str, Mapping[str, Any]],
    make: Callable[[Entry, Mapping[str, Any]], Run],
    run_all: Callable[[Sequence[Run]], Mapping[str, Outcome]],
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Tries half, all and twice the `lr` that was found before, with everything else as found.

    While the best lies at an end, the next factor of two beyond it follows.

    Returns:
        As `tuning.tune`.
    """
    losses: dict[str, dict[float, float]] = {entry.label: {} for entry in entries}
    going: dict[str, Sequence[float]] = dict.fromkeys(losses, FACTORS)
    while going:
        asked = {
            (entry.label, factor): make(entry, _scaled(rates[entry.label], factor))
            for entry in entries
            for factor in going.get(entry.label, ())
        }
        say(f"tuning: {len(asked)} runs of {len(going)} methods around the rates found before")
        done = run_all(list(asked.values()))
        for (label, factor), run in asked.items():
            if run.key in done:
                losses[label][factor] = done[run.key].loss
        going = {
            label: (_beyond(losses[label]),)
            for label in going
            if len(FACTORS) <= len(losses[label]) < MOST and _ends(losses[label])
        }
    return {label: _record(rates[label], own) for label, own in losses.items() if own}


def _best(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda factor: (losses[factor], factor))


def _ends(losses: Mapping[float, float]) -> bool:
    """Whether the best factor is the smallest or the largest one."""
    return _best(losses) in (min(losses), max(losses))


def _beyond(losses: Mapping[float, float]) -> float:
    """The factor after the best one, away from the others."""
    best = _best(losses)
    return best / 2 if best == min(losses) else best * 2


def _record(rates: Mapping[str, Any], losses: Mapping[float, float]) -> dict[str, Any]:
    trials = {factor: trial(_scaled(rates, factor), losses[factor]) for factor in sorted(losses)}
    edge = ["lr"] if _ends(losses) else []
    found = {"tried": len(trials), "edge": edge, "trials": list(trials.values())}
    return {**trials[_best(losses)], **found}


def _scaled(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {**options, "lr": float(f"{options['lr'] * factor:.3g}")}
