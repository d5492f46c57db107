"""Steps of deep models from those of two shallow ones, part by part.

A step works on lists of matrices together, in batches of bounded scratch. What it holds beside them
grows with each block; what a batch takes grows with the batch, which at some depth is full. So
each list's part of a step is taken on by itself: the level at its begin in proportion to the depth,
the rise above it in proportion to the largest batch, whose size at any depth is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowrank.optimizers.engine.scratch import Bounded

from .ledger import Ledger


@dataclass(frozen=True)
class Part:
    """A part of a step: while a list is worked on, or between lists.

    Attributes:
        split: the list, None between them.
        begin: bytes at its begin.
        peak: at the highest moment.
        outer: the part inside of which it is, which excludes it.
    """

    split: Bounded | None
    begin: int
    peak: int
    outer: Part | None = None


@dataclass(frozen=True)
class Step:
    """A step's parts.

    Attributes:
        parts: above what there is beside the step's scratch.
        renews: bases were fitted, or layers had events.
        left: bytes that are counted elsewhere, in a step that renews.
    """

    parts: tuple[Part, ...]
    renews: bool
    left: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the highest moment."""
        return max(part.peak for part in self.parts)


@dataclass
class _Open:
    split: Bounded | None
    begin: int
    peak: int = 0


@dataclass
class PartRecorder:
    """Notes the parts of a step while it is taken; a `BatchWatcher`."""

    ledger: Ledger
    _open: list[_Open] = field(default_factory=list)
    _parts: list[Part] = field(default_factory=list)

    def start(self) -> None:
        """A step begins."""
        self.ledger.restart()
        self._open, self._parts = [_Open(None, self.ledger.now.total)], []

    def begin(self, split: Bounded) -> None:
        """See `BatchWatcher.begin`."""
        self._cut()
        self._open.append(_Open(split, self.ledger.now.total))

    def end(self) -> None:
        """See `BatchWatcher.end`."""
        self._cut()
        self._close()

    def finish(self, before: int) -> tuple[Part, ...]:
        """The step's parts, above bytes that were there before."""
        self._cut()
        self._close()
        return tuple(_above(part, before) for part in self._parts)

    def _cut(self) -> None:
        last = self._open[-1]
        last.peak = max(last.peak, self.ledger.peak.total)
        self.ledger.restart()

    def _close(self) -> None:
        last = self._open.pop()
        above = self._open[-1] if self._open else None
        outer = None
        if above is not None and above.split is not None:
            outer = Part(above.split, above.begin, above.peak)
        self._parts.append(Part(last.split, last.begin, last.peak, outer))


def _above(part: Part, before: int) -> Part:
    outer = None if part.outer is None else _above(part.outer, before)
    return Part(part.split, part.begin - before, part.peak - before, outer)


@dataclass(frozen=True)
class Depths:
    """Numbers of blocks: of two models whose steps are known, and of the one that is planned."""

    few: int
    many: int
    planned: int

    def line(self, first: int, second: int) -> int:
        """What grows by the same amount with each block."""
        grows = (second - first) * (self.planned - self.many)
        return second + round(grows / (self.many - self.few))

    def sizes(self, first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
        """The list at the planned depth, from those of few and of many blocks; None if unclear."""
        first, second, apart = tuple(first), tuple(second), self.many - self.few
        if first == second:
            return second  # of parameters outside of blocks
        each, rest = divmod(len(second) - len(first), apart)
        if rest or each < 1:
            return None
        for place in range(len(first) + 1):
            if second[:place] + second[place + apart * each :] == first:
                block = second[place : place + each]
                return second[:place] + block * (self.planned - self.many) + second[place:]
        return None


def deeper(first: Step, second: Step, depths: Depths) -> int | None:
    """Bytes of a step of the planned model at its highest moment.

    Args:
        first: the step with few blocks.
        second: the same with many.
        depths: how many these are.

    Returns:
        None if the lists of one don't correspond to those of the other.
    """
    if first.renews != second.renews:
        return None
    levels = []
    # Single parameters and what is between lists: as many of them as there are blocks, perhaps.
    alone, others = _alone(first), _alone(second)
    if alone.keys() != others.keys():
        return None
    levels += [depths.line(alone[kind], others[kind]) for kind in others]
    lists, longer = _lists(first), _lists(second)
    if len(lists) != len(longer):
        return None
    for few, many in zip(lists, longer, strict=True):
        level = _level(few, many, depths)
        if level is None:
            return None
        levels.append(level)
    return max(levels)


def _alone(step: Step) -> dict[object, int]:
    highest: dict[object, int] = {}
    for part in step.parts:
        if part.split is None or len(part.split.sizes) == 1:
            kind = part.split
            highest[kind] = max(highest.get(kind, part.peak), part.peak)
    return highest


def _lists(step: Step) -> list[Part]:
    return [part for part in step.parts if part.split is not None and len(part.split.sizes) > 1]


def _level(few: Part, many: Part, depths: Depths) -> int | None:
    rise = _rise(few, many, few.peak - few.begin, many.peak - many.begin, depths)
    if rise is None:
        return None
    if few.outer is None or many.outer is None:
        both = few.outer is many.outer
        return depths.line(few.begin, many.begin) + rise if both else None
    inside = _rise(
        few.outer,
        many.outer,
        few.begin - few.outer.begin,
        many.begin - many.outer.begin,
        depths,
    )
    if inside is None:
        return None
    return depths.line(few.outer.begin, many.outer.begin) + inside + rise


def _rise(few: Part, many: Part, low: int, high: int, depths: Depths) -> int | None:
    """What grows with a list's largest batch: `low` and `high` at the planned depth."""
    first, second = few.split, many.split
    if first is None or second is None:
        return None
    if (first.refits, first.bound) != (second.refits, second.bound):
        return None
    sizes = depths.sizes(first.sizes, second.sizes)
    if sizes is None:
        return None
    smaller, larger = first.largest_batch, second.largest_batch
    planned = Bounded(sizes, second.bound, second.refits).largest_batch
    if planned == larger or not larger:
        return high
    if smaller == first.total and larger > smaller:
        return high + round((high - low) * (planned - larger) / (larger - smaller))
    return round(high * max(1.0, planned / larger))  # full, but for what each batch has left
