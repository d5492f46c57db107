"""Rounds of tuning runs for several methods side by side: ask, train, take down, leave out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from .entries import Entry
from .plan import Run
from .pool import Outcome, Say

#: What a search tries: any name of a run's settings.
Point = TypeVar("Point")
RunAll = Callable[[Sequence[Run]], Mapping[str, Outcome]]


def search(
    entries: Sequence[Entry],
    wanted: Callable[[Entry, Mapping[Point, float]], Collection[Point]],
    make: Callable[[Entry, Point], Run],
    run_all: RunAll,
    say: Say,
) -> dict[str, dict[Point, float]]:
    """Carries out what is wanted of each method until nothing more is.

    Args:
        entries: the methods.
        wanted: the points to try next of a method, from the losses known so far.
        make: the run of a point.
        run_all: carries runs out.
        say: told of each round.

    Returns:
        The loss of each point by label. A method of which a run has no outcome is left out whole:
        its best point would be the best of what happened to finish.
    """
    known: dict[str, dict[Point, float]] = {entry.label: {} for entry in entries}
    while True:
        asked = {
            (entry.label, point): make(entry, point)
            for entry in entries
            if entry.label in known
            for point in wanted(entry, known[entry.label])
        }
        if not asked:
            return known
        say(f"tuning: {len(asked)} runs of {len({label for label, _ in asked})} methods")
        done = run_all(list(asked.values()))
        for (label, _), run in asked.items():
            if run.key not in done:
                known.pop(label, None)
        for (label, point), run in asked.items():
            if label in known:
                known[label][point] = done[run.key].loss
