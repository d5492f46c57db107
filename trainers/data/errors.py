"""What can go wrong with data: each error is one sentence that names the file and the line."""

from __future__ import annotations


class DataError(ValueError):
    """The data can't be used, or can't be read any further."""


class DataWarning(UserWarning):
    """Something was passed over and counted, and the run goes on."""


class BadDocumentError(Exception):
    """One record of a shard is no usable document; the message is the bare reason."""


class ShardBrokenError(Exception):
    """A shard can't be read any further; the message is the bare reason."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, its type before it, cut to a readable length."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
