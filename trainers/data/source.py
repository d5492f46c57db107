"""From the configured name to the data itself."""

from __future__ import annotations

from .config import DataConfig
from .files import c4_source, folder_source
from .records import Source
from .stdlib import StdlibSource


def open_source(config: DataConfig) -> Source:
    """The source that a configuration names.

    Args:
        config: ``config.source`` is ``"stdlib"``, ``"c4"`` or a folder.

    Returns:
        The source. Nothing is read yet but lists of files.

    Raises:
        DataError: If a folder is missing or holds nothing usable.
    """
    if config.source == "stdlib":
        return StdlibSource()
    if config.source == "c4":
        return c4_source()
    return folder_source(config.source)


def data_fingerprint(config: DataConfig) -> dict[str, str | int]:
    """What identifies the data of a run, to be kept with it and compared on resume.

    Args:
        config: Its ``source`` is all that counts.

    Returns:
        ``source``, ``train_shards``, ``validation_shards`` and ``sha256`` (of file names and
        sizes; for ``stdlib`` of names and contents, with the ``python`` version and the number of
        ``files``). Paths of folders are no part of it: data may be moved.

    Raises:
        DataError: If a folder is missing or holds nothing usable.
    """
    return open_source(config).fingerprint()
