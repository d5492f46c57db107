"""Faults at single calls that change files: an error, or the process's sudden end.

`Disk` counts every call below a folder that creates, writes, flushes, renames or removes something,
whoever makes it (this package, torch, safetensors, transformers), and has one of them fail. A
write that fails leaves half of what it was to write.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import transformers
from _pytest.monkeypatch import MonkeyPatch

#: In place of an error number: the process ends, and with POWER what wasn't flushed is cut.
DEATH, POWER = "death", "power cut"
#: The exit status of a process that ends so.
DIED = 79
_TAKE_ROOM = ("open", "write", "fsync", "mkdir")
_NAMED = ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod")


@dataclass(frozen=True)
class Call:
    """One call: its name, and the path below the folder that it is about."""

    name: str
    path: str


class Disk:
    """Counts the changing calls below a folder and fails one of them.

    Args:
        root: the folder.
        fail_at: the number of the call that fails, counted from 0; None for none.
        kind: an error number, `DEATH` or `POWER`.
        name: count calls of this name alone.
        below: count calls below folders of this name alone.
        lasting: every later call that takes room fails, too, as on a disk that stays full.
    """

    def __init__(
        self,
        root: Path,
        fail_at: int | None = None,
        kind: int | str = errno.ENOSPC,
        *,
        name: str | None = None,
        below: str | None = None,
        lasting: bool = False,
    ) -> None:
        self.root = os.path.realpath(root)
        self.calls: list[Call] = []
        self._fail_at, self._kind = fail_at, kind
        self._name, self._below, self._lasting, self._failed = name, below, lasting, False
        self._unflushed: set[str] = set()

    def fails(self, name: str, path: Any, descriptor: int | None = None) -> bool:
        """Counts a call; whether it is to fail."""
        place = os.fspath(path)
        if descriptor is not None:
            place = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), place)
        place = os.path.abspath(place)
        if place != self.root and not place.startswith(self.root.rstrip(os.sep) + os.sep):
            return False
        if self._below is not None and self._below not in Path(place).parts:
            return False
        if name == "write":
            self._unflushed.add(place)
        elif name == "fsync":
            self._unflushed.discard(place)
        if self._name not in (None, name):
            return False
        self.calls.append(Call(name, os.path.relpath(place, self.root)))
        again = self._failed and self._lasting and name in _TAKE_ROOM
        fails = len(self.calls) - 1 == self._fail_at or again
        self._failed |= fails
        return fails

    def fail(self, path: Any) -> None:
        """Raises the error, or ends the process."""
        if isinstance(self._kind, int):
            raise OSError(self._kind, os.strerror(self._kind), os.fspath(path))
        if self._kind == POWER:
            for name in self._unflushed:
                if os.path.exists(name):
                    os.truncate(name, os.path.getsize(name) // 2)
        os._exit(DIED)

    def check(self, name: str, path: Any, descriptor: int | None = None) -> None:
        """Counts a call, and fails it if it is the one."""
        if self.fails(name, path, descriptor):
            self.fail(path)

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Counts and fails while the block runs."""
        with MonkeyPatch.context() as patch:
            for name in _NAMED:
                patch.setattr(os, name, self._named(name, getattr(os, name)))
            patch.setattr(os, "fsync", self._fsync(os.fsync))
            opening = self._open(io.open)
            patch.setattr(io, "open", opening)
            patch.setattr(builtins, "open", opening)
            save = self._save_file(safetensors.torch.save_file)
            patch.setattr(safetensors.torch, "save_file", save)
            fast = transformers.PreTrainedTokenizerFast
            patch.setattr(fast, "save_pretrained", self._save_tokenizer(fast.save_pretrained))
            yield self

    def _named(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **keywords: Any) -> Any:
            descriptor = keywords.get("dir_fd", keywords.get("src_dir_fd"))
            self.check(name, path, descriptor)
            return plain(path, *rest, **keywords)

        return call

    def _fsync(self, plain: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.check("fsync", os.readlink(f"/proc/self/fd/{number}"))
            plain(number)

        return call

    def _open(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
            writes = isinstance(file, str | os.PathLike) and set(mode) & set("wax+")
            if writes:
                self.check("open", file)
            stream = plain(file, mode, *rest, **keywords)
            return _Stream(self, stream, file) if writes else stream

        return call

    def _save_file(self, plain: Callable[..., None]) -> Callable[..., None]:
        def call(tensors: Any, path: Any, metadata: Any = None) -> None:
            if self.fails("write", path):
                data = safetensors.torch.save(tensors, metadata)
                with io.FileIO(path, "w") as stream:
                    stream.write(data[: len(data) // 2])
                try:
                    self.fail(path)
                except OSError as error:
                    # As the library tells it: without the error's type.
                    text = f"I/O error: {error.strerror} (os error {error.errno})"
                    raise safetensors.SafetensorError(text) from None
            plain(tensors, path, metadata)

        return call

    def _save_tokenizer(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(tokenizer: Any, folder: Any, *rest: Any, **keywords: Any) -> Any:
            path = os.path.join(folder, "tokenizer.json")
            if self.fails("write", path):
                with io.FileIO(path, "w") as stream:
                    stream.write(b'{"version": "1.0", "trunc')
                try:
                    self.fail(path)
                except OSError as error:
                    # As the library tells it: an error without a type of its own.
                    raise Exception(f"{error.strerror} (os error {error.errno})") from None
            return plain(tokenizer, folder, *rest, **keywords)

        return call


class _Stream:
    """A file opened for writing whose writes are counted."""

    def __init__(self, disk: Disk, stream: Any, path: Any) -> None:
        self._disk, self._stream, self._path = disk, stream, path

    def write(self, data: Any) -> Any:
        if self._disk.fails("write", self._path):
            text = isinstance(data, str)
            half = data[: len(data) // 2] if text else bytes(data)[: len(bytes(data)) // 2]
            self._stream.write(half)
            self._stream.flush()
            self._disk.fail(self._path)
        return self._stream.write(data)

    def __enter__(self) -> _Stream:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._stream.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_a_child(act: Callable[[], None]) -> int:
    """Runs `act` in a forked process; its exit status, 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
