"""Which documents of a folder without a validation file are held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from .diagnosis import reasons
from .errors import BadDocumentError, DataError
from .records import Record, Shard

# One record in this many.
SHARE = 20

#: Whether record ``ordinal`` of shard ``index`` is held out; both count from 0.
HeldOut = Callable[[int, int], bool]


def every_twentieth(index: int, ordinal: int) -> bool:
    """The rule for folders with enough records: those with (index + ordinal) % 20 == 19."""
    return (index + ordinal) % SHARE == SHARE - 1


def choose(
    label: str,
    shards: Sequence[Shard],
    read: Callable[[Shard], Iterable[Record]],
    parse: Callable[[Shard, Record], str],
) -> HeldOut:
    """The rule of a folder: a function of its content alone, whoever reads it and from where.

    `every_twentieth`, which is decided file by file, wherever it gives both splits a usable
    document; then the first twenty or so records are all that is read here. Short files may have
    no twentieth record at all: there the usable documents are counted over the whole folder, and
    every twentieth of them is held out, or the last one where they are fewer.

    Args:
        label: How messages call the folder.
        shards: The folder's files.
        read: All records of a file.
        parse: The document in a record; raises `BadDocumentError` where there is none.

    Returns:
        The rule.

    Raises:
        DataError: If fewer than two documents are usable.
    """
    places: list[tuple[int, int]] = []
    found = set()
    for shard in shards:
        for ordinal, record in enumerate(read(shard)):
            if not _usable(shard, record, parse):
                continue
            places.append((shard.index, ordinal))
            found.add(every_twentieth(shard.index, ordinal))
            if len(found) == 2:
                return every_twentieth
    if len(places) < 2:
        raise DataError(_too_few(label, len(places), reasons(shards, read, parse)))
    chosen = frozenset(places[SHARE - 1 :: SHARE] or places[-1:])
    return lambda index, ordinal: (index, ordinal) in chosen


def select(shard: Shard, records: Iterable[Record], held_out: HeldOut) -> Iterator[Record]:
    """The records that belong to a shard's share; what can't be read belongs to both."""
    wanted = shard.share == "held_out"
    for ordinal, record in enumerate(records):
        if record.problem is not None or held_out(shard.index, ordinal) == wanted:
            yield record


def _usable(shard: Shard, record: Record, parse: Callable[[Shard, Record], str]) -> bool:
    if record.problem is not None:
        return False
    try:
        parse(shard, record)
    except BadDocumentError:
        return False
    return True


def _too_few(label: str, count: int, problems: str) -> str:
    if count == 0:
        return f"{label} has no usable document: {problems}"
    others = f" (unusable: {problems})" if problems else ""
    return (
        f"{label} has one usable document{others}, which can't be trained on and held out for "
        "validation at once; add text, or a validation file beside it (such as validation.txt)"
    )
