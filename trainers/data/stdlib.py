"""Real text that is on every machine: the running Python's library sources and help topics."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from .errors import BadDocumentError, DataError
from .passages import passages
from .records import Record, Shard, Split, checked

TRAIN_SHARDS = 8

# One file in this many is held out for validation, by a hash of its path.
VALIDATION_SHARE = 20

# Not the library itself, its tests, tables written by programs, and what differs from one
# installation to the next.
_LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_LEFT_OUT_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "topics.py")


class StdlibSource:
    """The text of the running Python installation.

    A document is a passage of a file (see `passages`) or of a topic of `pydoc_data`. Files are
    split by a hash of their relative path: one in twenty is validation, the others are dealt to
    eight training shards.

    Args:
        root: Folder of the standard library; the running interpreter's own unless given.

    Raises:
        DataError: If the installation holds no library sources.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.name = "stdlib"
        self.label = "the standard library's text"
        self._root = root or Path(sysconfig.get_path("stdlib"))
        if not self._names["train"] or not self._names["validation"]:
            raise DataError(
                f"the Python installation at {self._root} holds no library sources; "
                "give a folder or 'c4' as data"
            )

    def shards(self, split: Split) -> Sequence[Shard]:
        """The shards of a split: eight for training, one for validation."""
        count = TRAIN_SHARDS if split == "train" else 1
        return [Shard(f"stdlib {split} {i}", f"{split}:{i}", "python", i) for i in range(count)]

    def records(self, shard: Shard) -> Iterator[Record]:
        """The shard's passages; those for validation are mixed: any prefix is a fair sample."""
        if shard.location.startswith("validation"):
            found = [
                (_digest(f"{name}:{number}"), number, name, passage)
                for name in self._names["validation"]
                for number, passage in self._passages(name)
            ]
            for _, number, name, passage in sorted(found):
                yield Record(number, (name, passage))
            return
        for name in self._names["train"][shard.index :: TRAIN_SHARDS]:
            for number, passage in self._passages(name):
                yield Record(number, (name, passage))

    def text(self, shard: Shard, record: Record) -> str:
        """The passage in a record.

        Raises:
            BadDocumentError: If its file isn't UTF-8.
        """
        if not isinstance(record.payload, tuple):
            raise BadDocumentError("the record is no passage")
        name, passage = record.payload
        try:
            return checked(passage, "the passage")
        except BadDocumentError as error:
            raise BadDocumentError(f"{name}: {error}") from error

    def fingerprint(self) -> dict[str, str | int]:
        """The Python version, the number of files, and a hash of their names and contents."""
        return {
            "source": self.name,
            "python": platform.python_version(),
            "files": len(self._names["train"]) + len(self._names["validation"]),
            "train_shards": TRAIN_SHARDS,
            "validation_shards": 1,
            "sha256": self._sha256,
        }

    @cached_property
    def _names(self) -> dict[Split, list[str]]:
        """Relative paths, and topics as ``topic:NAME``, in the order of their hashes."""
        names = sorted(
            (*_library_files(self._root), *(f"topic:{topic}" for topic in self._topics)),
            key=_digest,
        )
        held_out = {name for name in names if int(_digest(name)[:8], 16) % VALIDATION_SHARE == 0}
        return {
            "train": [name for name in names if name not in held_out],
            "validation": [name for name in names if name in held_out],
        }

    @cached_property
    def _topics(self) -> dict[str, str]:
        try:
            from pydoc_data.topics import topics
        except ImportError:  # Slim installations leave it out; the sources alone will do.
            return {}
        return dict(topics)

    @cached_property
    def _sha256(self) -> str:
        total = hashlib.sha256()
        for split in ("train", "validation"):
            for name in self._names[split]:
                total.update(f"{split} {name}\n".encode())
                total.update(hashlib.sha256(self._content(name)).digest())
        return total.hexdigest()

    def _content(self, name: str) -> bytes:
        if name.startswith("topic:"):
            return self._topics[name.removeprefix("topic:")].encode()
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self._root / name} can't be read: {error.strerror or error}"
            ) from error

    def _passages(self, name: str) -> Iterator[tuple[int, str]]:
        # A byte that isn't UTF-8 becomes a lone surrogate, which `checked` then refuses.
        text = self._content(name).decode("utf-8", errors="surrogateescape")
        return passages(text.replace("\r\n", "\n").split("\n"))


def _library_files(root: Path) -> list[str]:
    files = []
    for folder, inner, names in os.walk(root):
        # Pruned before they are entered: an installation's packages may be many times the library.
        inner[:] = [
            name
            for name in inner
            if name not in _LEFT_OUT_FOLDERS and not name.startswith("config-")
        ]
        files += [
            Path(folder, name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith(_LEFT_OUT_FILES)
        ]
    return files


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).hexdigest()
