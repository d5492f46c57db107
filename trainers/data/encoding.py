"""Which encoding a text file names by its byte-order mark."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

# The longer marks first: UTF-32's little-endian one begins with UTF-16's. The codecs take the
# byte order from the mark and drop it. UTF-8's mark needs no other decoder (see `parse_text`).
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"


def is_gzip(path: Path) -> bool:
    """Whether a file begins as gzip files do, whatever its name.

    Raises:
        OSError: If the file can't be opened or read.
    """
    with path.open("rb") as stream:
        return stream.read(len(_GZIP)) == _GZIP


def marked_encoding(path: Path) -> str | None:
    """``"utf-16"`` or ``"utf-32"`` if the file's text, gzipped or plain, opens with such a mark.

    Returns:
        None for any other text, and for a broken gzip file, which is the reader's to report.

    Raises:
        OSError: If the file can't be opened or read.
    """
    with path.open("rb") as stream:
        head = stream.read(4)
    if head.startswith(_GZIP):
        try:
            with gzip.open(path, "rb") as unpacked:
                head = unpacked.read(4)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return None
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)
