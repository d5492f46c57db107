"""Shards, their records, and the interface that every data source implements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .errors import BadDocumentError

Split = Literal["train", "validation"]
Format = Literal["json", "text", "parquet", "python"]
Share = Literal["all", "held_out", "rest"]

# The field or column that holds a document's text, unless data.text_key names another.
TEXT_KEY = "text"

# Names of fields or columns that a message lists.
_LISTED = 8


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
        number: Line or row it starts on, from 1; 0 for a file of which nothing could be read.
        payload: What the source's ``text`` parses.
        problem: Set on the last record of a shard that broke off: why.
    """

    number: int
    payload: object
    problem: str | None = None


class Source(Protocol):
    """A corpus: lists of shards, and the documents in them.

    Attributes:
        name: Its kind, the same wherever it lies.
        label: How messages call it.
    """

    name: str
    label: str

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
    return f"{shard.name}{place(shard, number)}"


def place(shard: Shard, number: int) -> str:
    """The part of `where` after the shard's name: `` line 3``, or nothing for the whole file."""
    return f" {'row' if shard.format == 'parquet' else 'line'} {number}" if number else ""


def parse_text(raw: object, first: bool) -> str:
    """Decode a passage that was read as Latin-1, so that each character stands for one byte.

    Args:
        raw: The passage.
        first: Whether it opens its file and so may carry a byte-order mark.

    Returns:
        The text.

    Raises:
        BadDocumentError: If it isn't UTF-8, holds NUL characters, or nothing but white space.
    """
    return checked(_decoded(raw, first), "the passage")


def _decoded(raw: object, first: bool) -> str:
    if not isinstance(raw, str):
        raise BadDocumentError(f"the record is {type(raw).__name__}, not text")
    try:
        return raw.encode("latin-1").decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadDocumentError(f"not UTF-8 (byte 0x{byte:02x}: {error.reason})") from error


def parse_json(raw: object, first: bool, key: str = TEXT_KEY) -> str:
    """The text field of one JSON line that was read as Latin-1.

    Args:
        raw: The line.
        first: Whether it opens its file and so may carry a byte-order mark.
        key: The field's name.

    Returns:
        The text.

    Raises:
        BadDocumentError: If the line isn't UTF-8, JSON, or an object with a non-empty string of
            that name.
    """
    line = checked(_decoded(raw, first), "the line")
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadDocumentError(f"broken JSON ({error.msg} at column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise BadDocumentError(f"broken JSON ({type(error).__name__})") from error
    if not isinstance(fields, dict):
        raise BadDocumentError(f"the JSON value is {type(fields).__name__}, not an object")
    if key not in fields:
        raise BadDocumentError(f"the JSON object has no field {key!r} ({other_names(fields)})")
    return checked(fields[key], repr(key))


def other_names(names: Iterable[object]) -> str:
    """The fields or columns there are instead, and how to choose one of them."""
    shown = [repr(str(name)[:40]) for name in names]
    if not shown:
        return "it has none"
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return f"it has {', '.join(shown[:_LISTED])}{more}; data.text_key chooses one"


def checked(text: object, what: str) -> str:
    """A document's text if it can be tokenised.

    Args:
        text: The document.
        what: How messages call it.

    Raises:
        BadDocumentError: If it is no string, is empty, or holds a lone surrogate or NULs.
    """
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise BadDocumentError(f"{what} is {kind}, not a string")
    if not text or text.isspace():
        raise BadDocumentError(f"{what} is empty")
    if "\0" in text:
        raise BadDocumentError(
            f"{what} holds NUL characters: binary data, or UTF-16 without a byte-order mark"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocumentError(
            f"{what} holds a lone surrogate, which UTF-8 can't express"
        ) from error
    return text
