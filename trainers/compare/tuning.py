"""Search for each method's settings on one declared grid, with a seed of its own.

From a start the search tries all neighbours of the best point so far, and ends when they are all
known: one place up and down in `lr` and in `plain_lr`, each other `betas`, and each other rule of
embeddings and head with `plain_lr` there and one place up and down, because the best rates of two
rules differ.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.optimizers.engine.method import TABLE

from ..choice import PLAIN_RULES, accepts_betas
from .entries import Entry
from .plan import FOUND, Run
from .pool import Outcome, Say

#: The grid of both learning rates.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Adam's betas beside the method's own; in short runs a low b1 is best for embeddings and head.
BETAS = ((0.9, 0.999), (0.9, 0.95), (0.5, 0.99))
START = 3e-3
#: Factors of lr that are tried around rates found before, and how many at most: further ones follow
#: while the best lies at an end.
REFINE, MOST_REFINED = (0.5, 1.0, 2.0), 5


@dataclass(frozen=True)
class Point:
    """A point of the grid; None is the method's own.

    Attributes:
        lr: of projected or hidden matrices.
        plain_lr: of embeddings, head and norms.
        betas: Adam's.
        plain_rule: of embeddings, head and norms.
    """

    lr: float
    plain_lr: float
    betas: tuple[float, float] | None = None
    plain_rule: str = "own"

    def options(self) -> dict[str, Any]:
        """As optimizer settings."""
        made: dict[str, Any] = {"lr": self.lr, "plain_lr": self.plain_lr}
        if self.betas is not None:
            made["betas"] = list(self.betas)
        if self.plain_rule != "own":
            made["plain_rule"] = self.plain_rule
        return made


@dataclass(frozen=True)
class Grid:
    """What may be tried of one method.

    Attributes:
        betas: beside the method's own.
        rules: of embeddings, head and norms.
        fixed: coordinates that the entry gives itself.
    """

    betas: tuple[tuple[float, float] | None, ...]
    rules: tuple[str, ...]
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tuned:
    """What was found of one method.

    Attributes:
        point: the best one.
        val_loss: its validation loss on the tuning seed.
        tried: runs it took.
        edge: which of its coordinates lie at an end of the grid.
    """

    point: Point
    val_loss: float
    tried: int
    edge: tuple[str, ...]


def declared() -> dict[str, Any]:
    """The grid, for the record."""
    return {
        "lr": list(RATES),
        "plain_lr": list(RATES),
        "betas": ["own", *(list(pair) for pair in BETAS)],
        "plain_rule": list(PLAIN_RULES),
    }


def grid_of(entry: Entry) -> Grid:
    """The grid of a method, less what it lacks or its entry gives."""
    given = frozenset(entry.settings.get("optimizer", {}))
    betas: tuple[tuple[float, float] | None, ...] = (None,)
    if "betas" not in given and accepts_betas(entry.optimizer):
        signature = inspect.signature(TABLE[entry.method].optimizer)
        own = signature.parameters["betas"].default if "betas" in signature.parameters else None
        betas = (None, *(pair for pair in BETAS if own is None or tuple(own) != pair))
    rules: tuple[str, ...] = ("own",)
    if "plain_rule" not in given:
        # A method that is itself the rule has it already.
        rules = tuple(rule for rule in PLAIN_RULES if rule != entry.optimizer)
    return Grid(betas, rules, given & {"lr", "plain_lr"})


def neighbours(point: Point, grid: Grid) -> set[Point]:
    """What is tried around a point."""
    lrs = [] if "lr" in grid.fixed else _beside(point.lr)
    plains = [] if "plain_lr" in grid.fixed else _beside(point.plain_lr)
    found = {_with(point, lr=lr) for lr in lrs}
    found |= {_with(point, plain_lr=rate) for rate in plains}
    found |= {_with(point, betas=pair) for pair in grid.betas}
    found |= {
        _with(point, plain_rule=rule, plain_lr=rate)
        for rule in grid.rules
        if rule != point.plain_rule
        for rate in (point.plain_lr, *plains)
    }
    return found - {point}


def wanted(known: Mapping[Point, float], grid: Grid) -> set[Point]:
    """The points to try next: none when the best point's neighbours are all known."""
    if not known:
        return {Point(START, START)}
    return neighbours(best(known), grid) - known.keys()


def best(known: Mapping[Point, float]) -> Point:
    """The point with the lowest loss; of equal ones the one with the lower rates."""
    return min(known, key=lambda point: (known[point], point.lr, point.plain_lr))


def tune(
    entries: Sequence[Entry],
    make: Callable[[Entry, Mapping[str, Any]], Run],
    run_all: Callable[[Sequence[Run]], Mapping[str, Outcome]],
    say: Say,
) -> dict[str, Tuned]:
    """Searches the grid for each of the methods, all of them side by side.

    Args:
        entries: the methods.
        make: the tuning run of a method with options of the optimizer.
        run_all: carries runs out.
        say: told of each round.

    Returns:
        What was found, by label; a method whose runs fail is left out.
    """
    grids = {entry.label: grid_of(entry) for entry in entries}
    known: dict[str, dict[Point, float]] = {entry.label: {} for entry in entries}
    going = {entry.label: entry for entry in entries}
    while going:
        asked = {
            (label, point): make(entry, point.options())
            for label, entry in going.items()
            for point in sorted(wanted(known[label], grids[label]), key=repr)
        }
        say(f"tuning: {len(asked)} runs of {len(going)} methods")
        done = run_all(list(asked.values()))
        for (label, point), run in asked.items():
            if run.key in done:
                known[label][point] = done[run.key].loss
            else:
                going.pop(label, None)
                known.pop(label, None)
        going = {
            label: entry for label, entry in going.items() if wanted(known[label], grids[label])
        }
    return {label: _tuned(points) for label, points in known.items()}


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
        The best options by label, with `val_loss`, `tried` and `edge`.
    """
    losses: dict[str, dict[float, float]] = {entry.label: {} for entry in entries}
    going: dict[str, Sequence[float]] = dict.fromkeys(losses, REFINE)
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
            if len(REFINE) <= len(losses[label]) < MOST_REFINED and _ends(losses[label])
        }
    return {label: _refined(rates[label], own) for label, own in losses.items() if own}


def refine_count() -> int:
    """The fewest runs that `refine` takes of a method."""
    return len(REFINE)


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


def record(found: Tuned) -> dict[str, Any]:
    """What was found, for JSON."""
    loss = found.val_loss if math.isfinite(found.val_loss) else None
    return {**found.point.options(), "val_loss": loss, "tried": found.tried, "edge": [*found.edge]}


def _tuned(points: Mapping[Point, float]) -> Tuned:
    point = best(points)
    ends = (RATES[0], RATES[-1])
    edge = tuple(name for name in ("lr", "plain_lr") if getattr(point, name) in ends)
    return Tuned(point, points[point], len(points), edge)


def _best_factor(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda factor: (losses[factor], factor))


def _ends(losses: Mapping[float, float]) -> bool:
    """Whether the best factor is the smallest or the largest one."""
    return _best_factor(losses) in (min(losses), max(losses))


def _beyond(losses: Mapping[float, float]) -> float:
    """The factor after the best one, away from the others."""
    best = _best_factor(losses)
    return best / 2 if best == min(losses) else best * 2


def _refined(rates: Mapping[str, Any], losses: Mapping[float, float]) -> dict[str, Any]:
    factor = _best_factor(losses)
    loss = losses[factor] if math.isfinite(losses[factor]) else None
    edge = ["lr"] if _ends(losses) else []
    return {**_scaled(rates, factor), "val_loss": loss, "tried": len(losses), "edge": edge}


def _beside(rate: float) -> list[float]:
    place = RATES.index(rate)
    return [RATES[i] for i in (place - 1, place + 1) if 0 <= i < len(RATES)]


def _scaled(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {**options, "lr": float(f"{options['lr'] * factor:.3g}")}


def _with(point: Point, **changes: Any) -> Point:
    values = {"lr": point.lr, "plain_lr": point.plain_lr, "betas": point.betas}
    return Point(**{**values, "plain_rule": point.plain_rule, **changes})
