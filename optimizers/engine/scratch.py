"""How much scratch parameters take that are worked on together, and batches that keep to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
        total: bytes of all of it.
        largest: of the largest part, which can't be split.
        bound: of a batch.
        refits: it is for refits of bases, rather than for updates.
    """

    total: int
    largest: int
    bound: int
    refits: bool


#: Records splits, see `watching_batches`.
_watched: list[Bounded] | None = None


@contextmanager
def watching_batches() -> Iterator[list[Bounded]]:
    """Collects what is split inside of it, for those who plan the scratch of larger models."""
    global _watched
    former, seen = _watched, list[Bounded]()
    _watched = seen
    try:
        yield seen
    finally:
        _watched = former


def bounded_batches(
    sizes: Sequence[int], bound: int, *, refits: bool = False
) -> Iterator[list[int]]:
    """Positions of consecutive parts whose bytes are at most `bound` together, or of one part."""
    if _watched is not None:
        _watched.append(Bounded(sum(sizes), max(sizes, default=0), bound, refits))
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
