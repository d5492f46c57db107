"""Sources made of files: a folder in C4's own layout or alike, and C4 itself on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import DataError
from .reader import HUB, read_records
from .records import Format, Record, Shard, Share, Split, checked, parse_json, parse_text, select

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
        name: How messages call the source.
        train: Training shards.
        validation: Validation shards.
        identity: Lines that identify the data, hashed into the fingerprint.
    """

    def __init__(
        self,
        name: str,
        train: Sequence[Shard],
        validation: Sequence[Shard],
        identity: Sequence[str],
    ) -> None:
        self.name = name
        self._shards: dict[Split, Sequence[Shard]] = {"train": train, "validation": validation}
        self._identity = tuple(identity)

    def shards(self, split: Split) -> Sequence[Shard]:
        """The shards of a split, in the order of their names."""
        return self._shards[split]

    def records(self, shard: Shard) -> Iterator[Record]:
        """The shard's records of its split, unparsed; see `read_records` for what it raises."""
        return select(shard, read_records(shard))

    def text(self, shard: Shard, record: Record) -> str:
        """The document in a record.

        Raises:
            BadDocumentError: If there is none.
        """
        if shard.format == "parquet":
            return checked(record.payload)
        parse = parse_json if shard.format == "json" else parse_text
        return parse(record.payload, record.number == 1)

    def fingerprint(self) -> dict[str, str | int]:
        """The source's name, its numbers of shards, and a hash of the files' names and sizes."""
        return {
            "source": self.name,
            "train_shards": len(self._shards["train"]),
            "validation_shards": len(self._shards["validation"]),
            "sha256": hashlib.sha256("\n".join(self._identity).encode()).hexdigest(),
        }


def c4_source() -> FileSource:
    """English C4 on the Hugging Face hub, in allenai/c4's own layout. Nothing is fetched yet."""

    def listed(split: str, count: int) -> list[Shard]:
        names = [f"en/c4-{split}.{i:05d}-of-{count:05d}.json.gz" for i in range(count)]
        return [
            Shard(f"allenai/c4/{name}", f"{HUB}datasets/allenai/c4/{name}", "json", i)
            for i, name in enumerate(names)
        ]

    train = listed("train", C4_TRAIN_SHARDS)
    validation = listed("validation", C4_VALIDATION_SHARDS)
    return FileSource("c4", train, validation, [shard.location for shard in (*train, *validation)])


def folder_source(folder: str) -> FileSource:
    """The shards in a folder.

    Files with ``validation``, ``valid`` or ``val`` as a word of their name are the validation
    split, all others the training split. Without a validation file, every twentieth record is
    held out for it.

    Args:
        folder: Path of the folder; its subfolders are not searched.

    Returns:
        The source.

    Raises:
        DataError: If there is no such folder, no usable or no training file in it, or one of a
            test split.
    """
    root = Path(folder).expanduser()
    files = _usable_files(root, folder)
    validation = [file for file in files if _VALIDATION.search(file.name.lower())]
    train = [file for file in files if file not in validation]
    if not train:
        raise DataError(f"{folder} holds validation files but no training file")
    shares: tuple[Share, Share] = ("all", "all") if validation else ("rest", "held_out")
    try:
        identity = [f"{file.name} {file.stat().st_size}" for file in files]
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror or error}") from error
    return FileSource(
        "folder",
        _listed(train, shares[0]),
        _listed(validation or train, shares[1]),
        identity,
    )


def _usable_files(root: Path, folder: str) -> list[Path]:
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
        what = "no usable file" if entries else "nothing"
        raise DataError(f"{folder} holds {what} (accepted: {accepted}){hint}")
    for file in files:
        if _TEST.search(file.name.lower()) and not _VALIDATION.search(file.name.lower()):
            raise DataError(
                f"{file} looks like a test split, which is neither trained nor validated on; "
                "move it out of the folder or rename it"
            )
    return files


def _listed(files: Sequence[Path], share: Share) -> list[Shard]:
    return [
        Shard(str(file), str(file.absolute()), _format(file) or "text", index, share)
        for index, file in enumerate(files)
    ]


def _format(path: Path) -> Format | None:
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)
