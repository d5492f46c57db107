"""Sources made of files: a folder in C4's own layout or alike, and C4 itself on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from .encoding import marked_encoding
from .errors import DataError
from .holdout import HeldOut, choose, select
from .reader import HUB, read_records
from .records import (
    TEXT_KEY,
    Format,
    Record,
    Shard,
    Share,
    Split,
    checked,
    parse_json,
    parse_text,
)

SUFFIXES: dict[str, Format] = {
    ".json.gz": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
C4_TRAIN_SHARDS = 1024
C4_VALIDATION_SHARDS = 8

_VALIDATION = re.compile(r"(?<![a-z])(validation|valid|val)(?![a-z])")
_TEST = re.compile(r"(?<![a-z])test(?![a-z])")


class FileSource:
    """Shards that are files, local or on the hub.

    Args:
        name: The source's kind.
        train: Training shards.
        validation: Validation shards.
        identity: Lines that identify the data, hashed into the fingerprint.
        label: How messages call the source.
        text_key: The field or column of a document's text.
        ignored: One sentence about what lies beside and isn't read, "" for nothing.
    """

    def __init__(
        self,
        name: str,
        train: Sequence[Shard],
        validation: Sequence[Shard],
        identity: Sequence[str],
        *,
        label: str,
        text_key: str = TEXT_KEY,
        ignored: str = "",
    ) -> None:
        self.name = name
        self.label = label
        self.ignored = ignored
        self._text_key = text_key
        self._shards: dict[Split, Sequence[Shard]] = {"train": train, "validation": validation}
        # The default adds nothing: what was made before there was a choice goes on.
        chosen = () if text_key == TEXT_KEY else (f"text_key {text_key}",)
        self._identity = (*identity, *chosen)

    def shards(self, split: Split) -> Sequence[Shard]:
        """The shards of a split, in the order of their names."""
        return self._shards[split]

    def records(self, shard: Shard) -> Iterator[Record]:
        """The shard's records of its split, unparsed.

        Raises:
            DataError: As `read_records`; or there are too few documents to hold one out.
        """
        if shard.share == "all":
            return self._read(shard)
        return select(shard, self._read(shard), self._held_out)

    def text(self, shard: Shard, record: Record) -> str:
        """The document in a record.

        Raises:
            BadDocumentError: If there is none.
        """
        if shard.format == "parquet":
            return checked(record.payload, repr(self._text_key))
        if shard.format == "json":
            return parse_json(record.payload, record.number == 1, self._text_key)
        return parse_text(record.payload, record.number == 1)

    def fingerprint(self) -> dict[str, str | int]:
        """The source's name, its numbers of shards, and a hash of the files' names and sizes."""
        return {
            "source": self.name,
            "train_shards": len(self._shards["train"]),
            "validation_shards": len(self._shards["validation"]),
            "sha256": hashlib.sha256("\n".join(self._identity).encode()).hexdigest(),
        }

    @cached_property
    def _held_out(self) -> HeldOut:
        return choose(self.label, self._shards["train"], self._read, self.text)

    def _read(self, shard: Shard) -> Iterator[Record]:
        return read_records(shard, self._text_key)


def c4_source(text_key: str = TEXT_KEY) -> FileSource:
    """English C4 on the Hugging Face hub, in allenai/c4's own layout. Nothing is fetched yet."""

    def listed(split: str, count: int) -> list[Shard]:
        names = [f"en/c4-{split}.{i:05d}-of-{count:05d}.json.gz" for i in range(count)]
        return [
            Shard(f"allenai/c4/{name}", f"{HUB}datasets/allenai/c4/{name}", "json", i)
            for i, name in enumerate(names)
        ]

    train = listed("train", C4_TRAIN_SHARDS)
    validation = listed("validation", C4_VALIDATION_SHARDS)
    identity = [shard.location for shard in (*train, *validation)]
    return FileSource("c4", train, validation, identity, label="C4", text_key=text_key)


def folder_source(folder: str, text_key: str = TEXT_KEY) -> FileSource:
    """The shards in a folder.

    Files with ``validation``, ``valid`` or ``val`` as a word of their name are the validation
    split, all others the training split. Without a validation file, every twentieth record of each
    file is held out for it, and where the files are too short for that, every twentieth document
    of the whole folder, at least one.

    Args:
        folder: Path of the folder; its subfolders are not searched.
        text_key: The field or column of a document's text in JSON and parquet files.

    Returns:
        The source.

    Raises:
        DataError: If there is no such folder, no usable or no training file in it, one of a
            test split or one that can't be opened; or `text_key` is given and no file has fields.
    """
    files, ignored = _usable_files(Path(folder).expanduser(), folder)
    validation = [file for file in files if _VALIDATION.search(file.name.lower())]
    train = [file for file in files if file not in validation]
    if not train:
        raise DataError(f"{folder} holds validation files but no training file")
    if text_key != TEXT_KEY and all(_format(file) == "text" for file in files):
        raise DataError(
            f"data.text_key is {text_key!r}, but {folder} holds only .txt files, which have no "
            "fields; leave it away"
        )
    shares: tuple[Share, Share] = ("all", "all") if validation else ("rest", "held_out")
    return FileSource(
        "folder",
        _listed(train, shares[0]),
        _listed(validation or train, shares[1]),
        [_identity(file) for file in files],
        label=f"the folder {folder}",
        text_key=text_key,
        ignored=ignored,
    )


def _identity(file: Path) -> str:
    """A file's name and size, and its encoding if that isn't UTF-8: it decides what is read."""
    try:
        size = file.stat().st_size
        encoding = None if _format(file) == "parquet" else marked_encoding(file)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}") from error
    return f"{file.name} {size}" + (f" {encoding}" if encoding else "")


def _usable_files(root: Path, folder: str) -> tuple[list[Path], str]:
    """The files that are read, and a sentence about the others."""
    accepted = ", ".join(SUFFIXES)
    if not root.exists():
        raise DataError(f"data.source {folder!r} is neither 'stdlib', 'c4' nor an existing folder")
    if not root.is_dir():
        raise DataError(f"data.source {folder!r} is a file; give the folder that holds it")
    try:
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror or error}") from error
    files = [path for path in entries if _format(path) is not None and path.is_file()]
    if not files:
        inner = [path.name for path in entries if path.is_dir()]
        hint = f"; did you mean its subfolder {inner[0]!r}?" if inner else ""
        what = f"no usable file, but {_named(entries)}" if entries else "nothing"
        raise DataError(f"{folder} holds {what} (accepted: {accepted}){hint}")
    for file in files:
        if _TEST.search(file.name.lower()) and not _VALIDATION.search(file.name.lower()):
            raise DataError(
                f"{file} looks like a test split, which is neither trained nor validated on; "
                "move it out of the folder or rename it"
            )
    others = [path for path in entries if path not in set(files)]
    return files, f"ignored in {folder}: {_named(others)}; read are {accepted}" if others else ""


def _named(others: Sequence[Path]) -> str:
    """Counts what isn't read, and names the first."""
    folders = [path.name for path in others if path.is_dir()]
    names = [path.name for path in others if path.name not in folders]
    parts = []
    for what, found in (("file", names), ("subfolder", folders)):
        if found:
            more = ", ..." if len(found) > 1 else ""
            parts.append(f"{len(found)} {what}{'s' * (len(found) > 1)} ({found[0]!r}{more})")
    lines = any(name.lower().endswith(".json") for name in names)
    hint = "; a file of JSON lines must be named .jsonl" if lines else ""
    return " and ".join(parts) + hint


def _listed(files: Sequence[Path], share: Share) -> list[Shard]:
    return [
        Shard(str(file), str(file.absolute()), _format(file) or "text", index, share)
        for index, file in enumerate(files)
    ]


def _format(path: Path) -> Format | None:
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
