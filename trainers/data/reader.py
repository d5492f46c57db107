"""Reads shards record by record: local lines by itself, parquet and the hub through `datasets`.

JSON is read line by line, so that one broken line is one broken line and every error can name it.
Lines are handed on as Latin-1, which maps each byte to one character: what isn't UTF-8 is found
document by document instead of ending the shard. Files that a byte-order mark names UTF-16 or
UTF-32 are decoded as that, and handed on as if they were UTF-8.

For compressed files `datasets` ignores the encoding that it is given, and takes the locale's: lines
from the hub come decoded.
"""

from __future__ import annotations

import contextlib
import gzip
import locale
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from ..missing import require
from .encoding import is_gzip, marked_encoding
from .errors import DataError, ShardBrokenError, first_line
from .passages import passages
from .records import TEXT_KEY, Record, Shard, other_names

HUB = "hf://"

# Small chunks: when a shard breaks off, what was read of its last chunk is lost with it.
_CHUNK = 1 << 16
_ROWS = 256

# Seconds before a shard on the hub is opened again, after each failure without progress between.
_WAITS = (1.0, 3.0, 9.0)
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeError)


def read_records(shard: Shard, text_key: str = TEXT_KEY) -> Iterator[Record]:
    """A file's records, unparsed, in order.

    Args:
        shard: A shard of format ``json``, ``text`` or ``parquet``.
        text_key: The column of a ``parquet`` shard that holds the text.

    Yields:
        The records; if the file can't be read to its end, a last one that says why.

    Raises:
        DataError: If the file is gone, unreadable, or the network fails: the run can't go on
            without it.
    """
    if shard.format == "parquet":
        rows = _UntilBroken(_rows(shard, text_key))
        for row in rows:
            yield Record(rows.count, row)
    else:
        rows = _UntilBroken(_lines(shard))
        if shard.format == "json":
            for line in rows:
                if str(line).strip(" \t\r"):
                    yield Record(rows.count, line)
        else:
            for number, passage in passages(map(str, rows)):
                yield Record(number, passage)
    if rows.problem is not None:
        part = "the rest of the file" if rows.count else "the file"
        yield Record(rows.count, None, f"{part} can't be read ({rows.problem})")


class _UntilBroken:
    """Counts what an iterator gives, and ends where it breaks off."""

    def __init__(self, values: Iterator[object]) -> None:
        self.count = 0
        self.problem: str | None = None
        self._values = values

    def __iter__(self) -> Iterator[object]:
        try:
            for value in self._values:
                self.count += 1
                yield value
        except ShardBrokenError as error:
            self.problem = str(error)


def _lines(shard: Shard) -> Iterator[str]:
    if _remote(shard):
        _check_locale(shard)
        options = {"encoding": "utf-8", "encoding_errors": "surrogateescape", "chunksize": _CHUNK}
        for example in _examples("text", shard, options):
            yield str(example["text"]).encode("utf-8", "surrogateescape").decode("latin-1")
        return
    try:
        yield from _local_lines(Path(shard.location))
    except _BROKEN as error:
        raise ShardBrokenError(_reason(error)) from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{shard.name} can't be read: {reason}") from error


def _local_lines(path: Path) -> Iterator[str]:
    encoding = marked_encoding(path)
    opened = gzip.open if path.suffix.lower() == ".gz" or is_gzip(path) else open
    with opened(path, "rt", encoding=encoding or "latin-1") as stream:
        # Text mode, in which every kind of line end has become "\n".
        while chunk := stream.read(_CHUNK):
            for line in StringIO(chunk + stream.readline()):
                bare = line.rstrip("\n")
                yield bare if encoding is None else bare.encode().decode("latin-1")


def _check_locale(shard: Shard) -> None:
    found = locale.getpreferredencoding(False)
    if found.lower().replace("-", "") != "utf8":
        raise DataError(
            f"{shard.name} can't be streamed: the locale's encoding is {found}, which would be "
            "taken for the data's; set PYTHONUTF8=1"
        )


def _rows(shard: Shard, column: str) -> Iterator[object]:
    if not _remote(shard):
        _check_path(shard)
        _check_column(shard, column)
    # The error is ours to report, once and with the row.
    logging.getLogger("datasets.packaged_modules.parquet.parquet").disabled = True
    for example in _examples("parquet", shard, {"columns": [column], "batch_size": _ROWS}):
        yield example[column]


def _remote(shard: Shard) -> bool:
    return shard.location.startswith(HUB)


def _examples(builder: str, shard: Shard, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    remote = _remote(shard)
    try:
        if remote:
            yield from _patiently(lambda: _streamed(builder, shard, options))
        else:
            yield from _streamed(builder, shard, options)
    except _BROKEN as error:
        raise ShardBrokenError(_reason(error)) from error
    except (DataError, ImportError):
        raise
    except Exception as error:
        # Libraries below raise many types; which one is the network's is no stable fact.
        if remote:
            raise DataError(
                f"{shard.name} can't be streamed from the Hugging Face hub ({first_line(error)}); "
                "check the network, or give a folder or 'stdlib' as data"
            ) from error
        if builder == "parquet":
            raise ShardBrokenError(first_line(error)) from error
        raise DataError(f"{shard.name} can't be read ({first_line(error)})") from error


def _reason(error: Exception) -> str:
    # Only the header's check says so; a broken checksum at the end is another thing.
    headless = isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error)
    return f"{'not a gzip file: ' if headless else ''}{first_line(error)}"


def _streamed(builder: str, shard: Shard, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    datasets = require("datasets", "train")
    with _no_download_count(datasets):
        dataset = datasets.load_dataset(
            builder,
            data_files={"train": [shard.location]},
            split="train",
            streaming=True,
            **options,
        )
    # Not iter(dataset): within a loader's worker that would deal out the shard once more.
    for examples in dataset.iter(batch_size=1):
        yield {name: values[0] for name, values in examples.items()}


def _patiently(
    opened: Callable[[], Iterator[dict[str, Any]]],
) -> Iterator[dict[str, Any]]:
    """What a remote file gives, opened anew where it stopped when the network fails for a while."""
    done = failures = 0
    while True:
        try:
            for example in islice(opened(), done, None):
                done += 1
                failures = 0
                yield example
            return
        except Exception as error:
            gone = isinstance(error, (FileNotFoundError, ImportError))
            permanent = gone or "Offline" in type(error).__name__
            if permanent or failures == len(_WAITS):
                raise
            time.sleep(_WAITS[failures])
            failures += 1


def _check_path(shard: Shard) -> None:
    special = next(
        (mark for mark in ("*", "?", "[", "]", "::", "://") if mark in shard.location), None
    )
    if special is not None:
        raise DataError(
            f"the path {shard.location!r} holds {special!r}, which streaming takes for a pattern; "
            "rename the folder or the file"
        )
    try:
        with Path(shard.location).open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{shard.name} can't be read: {error.strerror or error}") from error


def _check_column(shard: Shard, column: str) -> None:
    parquet = require("pyarrow.parquet", "train")
    try:
        names: list[str] = parquet.read_schema(shard.location).names
    except Exception as error:  # What the library raises for broken files is no stable fact.
        raise ShardBrokenError(f"not a parquet file: {first_line(error)}") from error
    if column not in names:
        raise ShardBrokenError(f"there is no column {column!r}: {other_names(names)}")


@contextlib.contextmanager
def _no_download_count(datasets: Any) -> Iterator[None]:
    """Keep `datasets` from reporting each load to a server: local data needs no network."""
    name = "HF_UPDATE_DOWNLOAD_COUNTS"
    before = getattr(datasets.config, name, None)
    setattr(datasets.config, name, False)
    try:
        yield
    finally:
        setattr(datasets.config, name, before)
