"""Shards, their records, and the interface that every data source implements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .errors import BadDocumentError

Split = Literal["train", "validation"]
Format = Literal["json", "text", "parquet", "python"]
Share = Literal["all", "held_out", "rest"]

# Where a folder has no validation file, every record r of its shard s with (s + r) % 20 == 19 is
# held out.
HOLDOUT = 20


@dataclass(frozen=True)
class Shard:
    """One file (or one slice of a source) that is read front to back.

    Attributes:
        name: How messages call it.
        location: Path or URL that it is read from.
        format: How its records are laid out.
        index: Its number in the source's list.
        share: Which of its records belong to the split it was listed for.
    """

    name: str
    location: str
    format: Format
    index: int
    share: Share = "all"


@dataclass(frozen=True, slots=True)
class Record:
    """One record before it is parsed.

    Attributes:
        number: Line or row it starts on, from 1.
        payload: What the source's ``text`` parses.
        problem: Set on the last record of a shard that broke off: why.
    """

    number: int
    payload: object
    problem: str | None = None


class Source(Protocol):
    """A corpus: lists of shards, and the documents in them."""

    name: str

    def shards(self, split: Split) -> Sequence[Shard]:
        """The shards of a split, in a fixed order."""

    def records(self, shard: Shard) -> Iterator[Record]:
        """The shard's records of its split, unparsed; if it breaks off, the last says why."""

    def text(self, shard: Shard, record: Record) -> str:
        """The document in a record.

        Raises:
            BadDocumentError: If there is none.
        """

    def fingerprint(self) -> dict[str, str | int]:
        """What identifies the data: plain values, ``sha256`` among them."""


def where(shard: Shard, number: int) -> str:
    """A place in a shard for messages, such as ``data/a.jsonl line 3``."""
    return f"{shard.name} {'row' if shard.format == 'parquet' else 'line'} {number}"


def select(shard: Shard, records: Iterator[Record]) -> Iterator[Record]:
    """The records that belong to the shard's share; see `HOLDOUT`."""
    if shard.share == "all":
        yield from records
        return
    wanted = shard.share == "held_out"
    for ordinal, record in enumerate(records):
        held_out = (shard.index + ordinal) % HOLDOUT == HOLDOUT - 1
        if record.problem is not None or held_out == wanted:
            yield record


def parse_text(raw: object, first: bool) -> str:
    """Decode a passage that was read as Latin-1, so that each character stands for one byte.

    Args:
        raw: The passage.
        first: Whether it opens its file and so may carry a byte-order mark.

    Returns:
        The text.

    Raises:
        BadDocumentError: If it isn't UTF-8, or holds nothing but white space.
    """
    if not isinstance(raw, str):
        raise BadDocumentError(f"the record is {type(raw).__name__}, not text")
    try:
        text = raw.encode("latin-1").decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadDocumentError(f"not UTF-8 (byte 0x{byte:02x}: {error.reason})") from error
    return checked(text)


def parse_json(raw: object, first: bool) -> str:
    """The ``text`` field of one JSON line that was read as Latin-1.

    Args:
        raw: The line.
        first: Whether it opens its file and so may carry a byte-order mark.

    Returns:
        The text.

    Raises:
        BadDocumentError: If the line isn't UTF-8, JSON, or an object with a non-empty string
            ``text``.
    """
    line = parse_text(raw, first)
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadDocumentError(f"broken JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise BadDocumentError(f"broken JSON ({type(error).__name__})") from error
    if not isinstance(fields, dict):
        raise BadDocumentError(f"the JSON value is {type(fields).__name__}, not an object")
    if "text" not in fields:
        raise BadDocumentError("the JSON object has no field 'text'")
    return checked(fields["text"])


def checked(text: object) -> str:
    """A document's text if it can be tokenised.

    Raises:
        BadDocumentError: If it is no string, is empty, or holds a lone surrogate.
    """
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise BadDocumentError(f"'text' is {kind}, not a string")
    if not text or text.isspace():
        raise BadDocumentError("'text' is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocumentError(
            "'text' holds a lone surrogate, which UTF-8 can't express"
        ) from error
    return text
