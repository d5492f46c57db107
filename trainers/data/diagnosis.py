"""Why data are unusable: the first files, and the problem of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from .errors import BadDocumentError
from .records import Record, Shard, Source, Split, place

# Files that are named, and records of one that are looked at: the first bad one says it all.
_FILES = 3
_RECORDS = 1000


def why_unusable(source: Source, split: Split) -> str:
    """`reasons` for the files of a split, whatever share of them belongs to it."""
    shards = [replace(shard, share="all") for shard in source.shards(split)]
    return reasons(shards, source.records, source.text)


def reasons(
    shards: Sequence[Shard],
    read: Callable[[Shard], Iterable[Record]],
    parse: Callable[[Shard, Record], str],
) -> str:
    """The first problem of each of the first few files that have one.

    Args:
        shards: Files in order.
        read: All records of a file.
        parse: The document in a record; raises `BadDocumentError` where there is none.

    Returns:
        Such as ``a.jsonl line 1: broken JSON (...); b.txt is empty; and 7 more files``; "" if no
        file has a problem.
    """
    found: list[str] = []
    looked_at = 0
    for shard in shards:
        looked_at += 1
        problem = _first_problem(shard, read, parse)
        if problem is not None:
            found.append(problem)
        if len(found) == _FILES:
            break
    left = len(shards) - looked_at
    if found and left:
        found.append(f"and {left} more file{'s' if left > 1 else ''}")
    return "; ".join(found)


def _first_problem(
    shard: Shard,
    read: Callable[[Shard], Iterable[Record]],
    parse: Callable[[Shard, Record], str],
) -> str | None:
    name = Path(shard.name).name
    empty = True
    for record in islice(read(shard), _RECORDS):
        empty = False
        try:
            if record.problem is not None:
                raise BadDocumentError(record.problem)
            parse(shard, record)
        except BadDocumentError as error:
            return f"{name}{place(shard, record.number)}: {error}"
    return f"{name} is empty" if empty else None
