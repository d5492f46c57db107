"""From the configured name to the data itself."""

from __future__ import annotations

from .config import DataConfig
from .errors import DataError
from .files import c4_source, folder_source
from .records import TEXT_KEY, Source
from .stdlib import StdlibSource


def open_source(config: DataConfig) -> Source:
    """The source that a configuration names.

    Args:
        config: ``config.source`` is ``"stdlib"``, ``"c4"`` or a folder.

    Returns:
        The source. Nothing is read yet but lists of files.

    Raises:
        DataError: If a folder is missing or holds nothing usable, or `text_key` is given for data
            without fields.
    """
    if config.source == "stdlib":
        if config.text_key != TEXT_KEY:
            raise DataError(
                f"data.text_key is {config.text_key!r}, but the standard library's text has no "
                "fields; leave it away"
            )
        return StdlibSource()
    if config.source == "c4":
        return c4_source(config.text_key)
    return folder_source(config.source, config.text_key)


def data_fingerprint(config: DataConfig) -> dict[str, str | int]:
    """What identifies the data of a run, to be kept with it and compared on resume.

    Args:
        config: Its ``source`` and ``text_key`` are all that counts.

    Returns:
        ``source``, ``train_shards``, ``validation_shards`` and ``sha256`` (of file names and
        sizes, of an encoding that isn't UTF-8 and a ``text_key`` that isn't the default; for
        ``stdlib`` of names and contents, with the ``python`` version and the number of
        ``files``). Paths of folders are no part of it: data may be moved.

    Raises:
        DataError: If a folder is missing or holds nothing usable.
    """
    return open_source(config).fingerprint()
