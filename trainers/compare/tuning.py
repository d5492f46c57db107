"""Search for each method's settings on one declared grid, with a seed of its own.

From a start the search tries all neighbours of the best point so far, and ends when they are all
known: one place up and down in `lr` and in `plain_lr`, each other `betas`, and each other rule of
embeddings and head with `plain_lr` there and one place up and down, because the best rates of two
rules differ. Where it is asked for, the search then moves the rates of embeddings and of the head
apart from `plain_lr`, and goes on from there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lowrank.optimizers.engine.method import TABLE
from lowrank.optimizers.plain_parts import APART

from ..choice import accepts_betas
from ..official import is_official
from .entries import Entry
from .plan import Run
from .pool import Say
from .search import RunAll, search

#: The grid of both learning rates.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Adam's betas beside the method's own; in short runs a low b1 is best for embeddings and head.
BETAS = ((0.9, 0.999), (0.9, 0.95), (0.5, 0.99))
#: Rules of embeddings, head and norms; AdamW with moments of 8 bits trains as AdamW does.
RULES = ("own", "adamw", "adafactor")
START = 3e-3
#: Coordinates of a point that are learning rates.
_RATES = ("lr", "plain_lr", *APART)


@dataclass(frozen=True)
class Point:
    """A point of the grid; None is the method's own.

    Attributes:
        lr: of projected or hidden matrices.
        plain_lr: of embeddings, head and norms; None is `lr`, where an entry says so.
        betas: Adam's.
        plain_rule: of embeddings, head and norms.
        embedding_lr: of embeddings alone; None is `plain_lr`.
        head_lr: of the output head alone; None is `plain_lr`.
    """

    lr: float
    plain_lr: float | None
    betas: tuple[float, float] | None = None
    plain_rule: str = "own"
    embedding_lr: float | None = None
    head_lr: float | None = None

    def rates(self) -> dict[str, float]:
        """Its learning rates that are given."""
        values = {name: getattr(self, name) for name in _RATES}
        return {name: value for name, value in values.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """As optimizer settings."""
        made: dict[str, Any] = self.rates()
        if self.betas is not None:
            made["betas"] = list(self.betas)
        if self.plain_rule != "own":
            made["plain_rule"] = self.plain_rule
        return made


@dataclass(frozen=True)
class Grid:
    """What may be tried of one method.

    Attributes:
        betas: those that may be tried, None is the method's own.
        rules: of embeddings, head and norms.
        given: rates, betas and rule that the entry gives itself; they are not moved.
        apart: the rules under which embeddings and head may have rates of their own.
    """

    betas: tuple[tuple[float, float] | None, ...]
    rules: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    apart: tuple[str, ...] = ()

    @property
    def start(self) -> Point:
        """Where the search begins: in the middle, but for what the entry gives."""
        return replace(Point(START, START), **self.given)


def declared(apart: bool) -> dict[str, Any]:
    """The grid, for the record.

    Args:
        apart: whether embeddings and head may have rates of their own.
    """
    own = {name: ["plain_lr", *RATES] for name in APART} if apart else {}
    return {
        "lr": list(RATES),
        "plain_lr": list(RATES),
        **own,
        "betas": ["own", *(list(pair) for pair in BETAS)],
        "plain_rule": list(RULES),
    }


def grid_of(entry: Entry, apart: bool = False) -> Grid:
    """The grid of a method, less what it lacks or its entry gives.

    Args:
        entry: the method.
        apart: whether embeddings and head may have rates of their own.
    """
    given = given_by(entry)
    betas: tuple[tuple[float, float] | None, ...] = (given.get("betas"),)
    if "betas" not in given and accepts_betas(entry.optimizer):
        signature = inspect.signature(TABLE[entry.method].optimizer)
        own = signature.parameters["betas"].default if "betas" in signature.parameters else None
        betas = (None, *(pair for pair in BETAS if own is None or tuple(own) != pair))
    rules: tuple[str, ...] = (given.get("plain_rule", "own"),)
    if "plain_rule" not in given:
        # A method that is itself the rule has it already.
        rules = tuple(rule for rule in RULES if rule != entry.optimizer)
    apart_rules = rules if apart else ()
    if is_official(entry.optimizer):
        # Packages know one rate for all that they don't project.
        apart_rules = tuple(rule for rule in apart_rules if rule != "own")
    return Grid(betas, rules, given, apart_rules)


def given_by(entry: Entry) -> dict[str, Any]:
    """The coordinates of a point that an entry gives itself."""
    options = entry.settings.get("optimizer", {})
    given = {item.name: options[item.name] for item in fields(Point) if item.name in options}
    if isinstance(given.get("betas"), list):
        given["betas"] = tuple(given["betas"])
    if given.get("plain_rule", "own") is None:
        given["plain_rule"] = "own"
    return given


def neighbours(point: Point, grid: Grid) -> set[Point]:
    """What is tried around a point."""
    found = {point}
    for name in ("lr", "plain_lr"):
        found |= _moved(point, grid, name)
    found |= {replace(point, betas=pair) for pair in grid.betas}
    for rule in grid.rules:
        other = replace(point, plain_rule=rule)
        if rule not in grid.apart:
            other = _with(other, **{n: None for n in APART if n not in grid.given})
        if rule != point.plain_rule:
            found |= {other, *_moved(other, grid, "plain_lr")}
    return found - {point}


def moved_apart(point: Point, grid: Grid) -> set[Point]:
    """What is tried around a point whose neighbours are known: rates of embeddings and head."""
    if point.plain_rule not in grid.apart:
        return set()
    free = [name for name in APART if name not in grid.given]
    rates = point.rates()
    plain = rates.get("plain_lr", point.lr)
    # From here on plain_lr is of norms alone.
    parted = _with(point, **{name: rates.get(name, plain) for name in free})
    return {moved for name in free for moved in _moved(parted, grid, name)}


def wanted(known: Mapping[Point, float], grid: Grid) -> set[Point]:
    """The points to try next: none when all around the best point are known."""
    if not known:
        return {grid.start}
    point = best(known)
    return neighbours(point, grid) - known.keys() or moved_apart(point, grid) - known.keys()


def best(known: Mapping[Point, float]) -> Point:
    """The point with the lowest loss; of equal ones the one with the lower rates."""
    return min(known, key=lambda point: (known[point], point.lr, point.plain_lr or point.lr))


def tune(
    entries: Sequence[Entry],
    make: Callable[[Entry, Mapping[str, Any]], Run],
    run_all: RunAll,
    say: Say,
    apart: bool = False,
) -> dict[str, dict[str, Any]]:
    """Searches the grid for each of the methods, all of them side by side.

    Args:
        entries: the methods.
        make: the tuning run of a method with options of the optimizer.
        run_all: carries runs out.
        say: told of each round.
        apart: whether embeddings and head may have rates of their own.

    Returns:
        The best options by label, with `val_loss`, how many were `tried`, which rates lie at an
        `edge` of the grid, and all `trials`; a method of which a run fails is left out.
    """
    grids = {entry.label: grid_of(entry, apart) for entry in entries}

    def next_points(entry: Entry, known: Mapping[Point, float]) -> list[Point]:
        return sorted(wanted(known, grids[entry.label]), key=repr)

    def run_of(entry: Entry, point: Point) -> Run:
        return make(entry, point.options())

    known = search(entries, next_points, run_of, run_all, say)
    return {label: _record(points, grids[label]) for label, points in known.items()}


def _moved(point: Point, grid: Grid, name: str) -> set[Point]:
    """The point with one rate a place up and down on the grid, on which an entry's need not lie."""
    if name in grid.given:
        return set()
    rate = point.rates()[name]
    beside = [[at for at in RATES if at < rate][-1:], [at for at in RATES if at > rate][:1]]
    return {_with(point, **{name: at}) for places in beside for at in places}


def _with(point: Point, **changes: Any) -> Point:
    return replace(point, **changes)


def _record(points: Mapping[Point, float], grid: Grid) -> dict[str, Any]:
    """What was found of one method, for JSON."""
    point = best(points)
    trials = [trial(each.options(), loss) for each, loss in points.items()]
    free = {name: rate for name, rate in point.rates().items() if name not in grid.given}
    edge = [name for name, rate in free.items() if rate in (RATES[0], RATES[-1])]
    found = {"tried": len(trials), "edge": edge, "trials": trials}
    return {**trial(point.options(), points[point]), **found}


def trial(options: Mapping[str, Any], loss: float) -> dict[str, Any]:
    """Options that were tried, and the loss they had (None where the run broke off), for JSON."""
    return {**options, "val_loss": loss if math.isfinite(loss) else None}
