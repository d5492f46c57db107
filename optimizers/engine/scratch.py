"""How much scratch parameters take that are worked on together, and batches that keep to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from .devices import device_memory

#: Bound on the scratch of several matrices that are worked on together.
SCRATCH_BYTES = 256 << 20
#: The same for what is between the products of a step on a GPU, whichever it is.
DEVICE_SCRATCH_BYTES = 1 << 30
#: Divisor of a GPU's memory, for its share that this may take.
DEVICE_SCRATCH_SHARE = 16


def device_scratch(device: torch.device) -> int:
    """Bound on the scratch of matrices of one shape that a step on a GPU works on together.

    A sixteenth of its memory, and at least `DEVICE_SCRATCH_BYTES`: 1.5 GiB of a card with 24 GiB,
    5 GiB of one with 80. It follows from the card, not from what is free, so that runs repeat.
    """
    return max(DEVICE_SCRATCH_BYTES, device_memory(device) // DEVICE_SCRATCH_SHARE)


@dataclass(frozen=True)
class Bounded:
    """What was split into batches of bounded scratch.

    Attributes:
        sizes: bytes of its parts, which can't be split.
        bound: of a batch.
        refits: it is for refits of bases, rather than for updates.
    """

    sizes: tuple[int, ...]
    bound: int
    refits: bool

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return sum(self.sizes)

    @property
    def largest_batch(self) -> int:
        """Bytes of the largest batch."""
        return max(sum(self.sizes[i] for i in batch) for batch in _batches(self.sizes, self.bound))


class BatchWatcher(Protocol):
    """Is told of what is split, see `watching_batches`."""

    def begin(self, split: Bounded) -> None:
        """The first batch is about to be worked on."""

    def end(self) -> None:
        """The last one was; those that began later have ended before."""


#: See `watching_batches`.
_watcher: BatchWatcher | None = None


@contextmanager
def watching_batches(watcher: BatchWatcher) -> Iterator[None]:
    """Tells of what is split inside of it, for those who plan the scratch of larger models."""
    global _watcher
    former, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = former


def bounded_batches(
    sizes: Sequence[int], bound: int, *, refits: bool = False
) -> Iterator[list[int]]:
    """Positions of consecutive parts whose bytes are at most `bound` together, or of one part."""
    watcher = _watcher
    if watcher is None or not sizes:
        yield from _batches(sizes, bound)
        return
    watcher.begin(Bounded(tuple(sizes), bound, refits))
    try:
        yield from _batches(sizes, bound)
    finally:
        watcher.end()


def _batches(sizes: Sequence[int], bound: int) -> Iterator[list[int]]:
    batch: list[int] = []
    used = 0
    for position, size in enumerate(sizes):
        if batch and used + size > bound:
            yield batch
            batch, used = [], 0
        batch.append(position)
        used += size
    if batch:
        yield batch
