"""Errors of data: each message is one sentence that names the file and the line."""

from __future__ import annotations

from collections.abc import Callable

# Warnings about single files before the others are only counted.
FEW = 5


class DataError(ValueError):
    """The data can't be used, or can't be read any further."""


class DataWarning(UserWarning):
    """Records were skipped and counted; the run continues."""


class BadDocumentError(Exception):
    """One record of a shard is no usable document; the message is the bare reason."""


class ShardBrokenError(Exception):
    """A shard can't be read any further; the message is the bare reason."""


class FirstFew:
    """Passes on the first few different warnings, then says once that there are more.

    Args:
        report: Takes them.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._seen: set[str] = set()

    def __call__(self, message: str) -> None:
        """Passes a warning on, or not."""
        if message in self._seen or len(self._seen) > FEW:
            return
        self._seen.add(message)
        if len(self._seen) > FEW:
            message = "unusable records in further files are counted without a warning"
        self._report(message)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, its type before it, cut to a readable length."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
