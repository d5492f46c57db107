"""Atomic writes: to a temporary file, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

#: A model's dense weights, as `from_pretrained` names them.
WEIGHTS = "model.safetensors"
BLOCK_BYTES = 1 << 20
#: How libraries written in Rust name the operating system's error in their own.
_NUMBER = re.compile(r"\(os error (\d+)\)")


class WriteError(OSError):
    """A file can't be written; `filename` is the file, `strerror` the reason."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts the errors of a failing write, in Python or in a library, to one `WriteError`.

    Libraries report a full disk with their own types: torch with a `RuntimeError` caused by the
    operating system's, safetensors and tokenizers with exceptions that contain it only as text.

    Args:
        path: the file that the block writes.

    Raises:
        WriteError: a write failed.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        system = _system_error(error)
        if system is not None:
            reason = system.strerror or str(system)
            raise WriteError(system.errno, reason, str(path)) from error
        number = _NUMBER.search(str(error))
        if number:
            reason = os.strerror(int(number[1]))
            raise WriteError(int(number[1]), reason, str(path)) from error
        if type(error).__name__ == "SafetensorError":
            raise WriteError(None, " ".join(str(error).split())[:200], str(path)) from error
        raise


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error among those that led to this one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path`: atomically, so that no reader sees a part of it.

    Raises:
        WriteError: it can't be written; nothing of it stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def real_name(folder: Path) -> str:
    """A folder's own name, whatever link or `..` leads to it.

    `Path.resolve` raises `RuntimeError` for links that lead to themselves; of these this is the
    link's name.
    """
    return Path(os.path.realpath(folder)).name


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
