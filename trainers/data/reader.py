"""Reads shards record by record through `datasets`, from a local path or from the hub alike.

Lines come from its ``text`` builder rather than its ``json`` one, so that one broken line is one
broken line and every error can name it. They are read as Latin-1, which maps each byte to one
character: what isn't UTF-8 is found document by document instead of ending the shard.
"""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from gzip import BadGzipFile
from itertools import islice
from pathlib import Path
from typing import Any

from ..missing import require
from .errors import DataError, ShardBrokenError, first_line
from .passages import passages
from .records import Record, Shard

HUB = "hf://"

# Small chunks: when a shard breaks off, what was read of its last chunk is lost with it.
_CHUNK = 1 << 16
_ROWS = 256

# Seconds before a shard on the hub is opened again, after each failure without progress between.
_WAITS = (1.0, 3.0, 9.0)
_BROKEN = (EOFError, BadGzipFile, zlib.error)


def read_records(shard: Shard) -> Iterator[Record]:
    """A file's records, unparsed, in order.

    Args:
        shard: A shard of format ``json``, ``text`` or ``parquet``.

    Yields:
        The records; if the file can't be read to its end, a last one that says why.

    Raises:
        DataError: If the file is gone, unreadable, or the network fails: the run can't go on
            without it.
    """
    if shard.format == "parquet":
        rows = _UntilBroken(_rows(shard))
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
        problem = f"the rest of the file can't be read ({rows.problem})"
        yield Record(max(rows.count, 1), None, problem)


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
    options = {"encoding": "latin-1", "chunksize": _CHUNK}
    for example in _examples("text", shard, options):
        yield str(example["text"])


def _rows(shard: Shard) -> Iterator[object]:
    # The error is ours to report, once and with the row.
    logging.getLogger("datasets.packaged_modules.parquet.parquet").disabled = True
    for example in _examples("parquet", shard, {"columns": ["text"], "batch_size": _ROWS}):
        yield example["text"]


def _examples(builder: str, shard: Shard, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    remote = shard.location.startswith(HUB)
    if not remote:
        _check_path(shard)
    try:
        if remote:
            yield from _patiently(lambda: _streamed(builder, shard, options))
        else:
            yield from _streamed(builder, shard, options)
    except _BROKEN as error:
        raise ShardBrokenError(first_line(error)) from error
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
            raise ShardBrokenError(_parquet_reason(error)) from error
        raise DataError(f"{shard.name} can't be read ({first_line(error)})") from error


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
        raise DataError(f"{shard.name} can't be opened: {error.strerror or error}") from error


def _parquet_reason(error: Exception) -> str:
    if "FieldRef.Name(text)" in str(error) or "columns" in str(error):
        return f"no column 'text' ({first_line(error)})"
    return first_line(error)


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
