"""Checkpoints: folders that are written atomically, checksummed, and limited in number.

A checkpoint ``step-00000200`` holds ``model.safetensors`` with Hugging Face's ``config.json`` and
the tokenizer's files (so the folder loads with ``AutoModelForCausalLM.from_pretrained``),
``optimizer.pt`` and ``trainer.pt`` (both load with ``weights_only=True``), for quantised weights
and converted layers ``layers.safetensors``, and ``manifest.json``: the size and SHA-256 of each of
the others. It is written into a temporary folder, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import sha256, sync, write_text, writing
from .watch import is_connection_failure

FORMAT = 1
MANIFEST = "manifest.json"
_PREFIX = "step-"
_TEMPORARY = ".writing-"
_DISCARDED = ".discarded-"


class CheckpointError(OSError):
    """A checkpoint can't be written; the message is one line with advice."""


class _UnflushedError(OSError):
    """A whole checkpoint has its name, which a power cut may still take away."""


class DamagedCheckpointError(ValueError):
    """A checkpoint doesn't match its manifest; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of an intact checkpoint.

    Attributes:
        folder: the checkpoint.
        step: optimizer steps done when it was written.
        val_loss: the validation loss at that very step, None when none was measured.
    """

    folder: Path
    step: int
    val_loss: float | None


class CheckpointStore:
    """The folder ``checkpoints`` of a run.

    Args:
        folder: made when the first checkpoint is written.
        keep: number of newest checkpoints to keep.
        keep_best: also keep the one with the lowest validation loss.
    """

    def __init__(self, folder: Path, *, keep: int, keep_best: bool) -> None:
        self.folder = folder
        self._keep = keep
        self._keep_best = keep_best

    def save(self, step: int, val_loss: float | None, write: Callable[[Path], None]) -> Path:
        """Writes a checkpoint and removes those that are not to be kept.

        Args:
            step: optimizer steps done.
            val_loss: the validation loss at this step, if it was measured.
            write: writes the files into the folder it is given.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the disk is full or failing; nothing of the checkpoint remains,
                unless it is whole, and the previous ones are unchanged.
        """
        final = self.folder / step_name(step)
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync(self.folder.parent)
            self.remove_leftovers()
            temporary.mkdir()
            self._fill(temporary, step, val_loss, write)
            self._publish(temporary, final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # where this was to be the first checkpoint
            if isinstance(error, OSError):
                raise CheckpointError(self._unwritten(final, error)) from error
            raise
        try:
            self._prune(newest=final)
        except OSError as error:
            # Nothing that the run needs: the new one is whole.
            warnings.warn(
                f"an old checkpoint in {self.folder} can't be removed ({error.strerror or error});"
                " the next one that is written tries it again",
                stacklevel=2,
            )
        return final

    def _publish(self, temporary: Path, final: Path) -> None:
        """Gives a whole checkpoint its name."""
        former = self.folder / f"{_DISCARDED}{final.name}"
        if final.exists():
            # A damaged one, or the same step written again after an older one was resumed.
            final.rename(former)
        try:
            temporary.rename(final)
        except OSError:
            with contextlib.suppress(OSError):
                former.rename(final)
            raise
        try:
            sync(self.folder)
        except OSError as error:
            raise _UnflushedError(error.errno, error.strerror) from error

    def _fill(
        self, folder: Path, step: int, val_loss: float | None, write: Callable[[Path], None]
    ) -> None:
        """Writes a checkpoint's files and its manifest, and flushes them to the disk."""
        write(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            with writing(path):
                sync(path)
        content: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
            },
        }
        content["self"] = _digest(content)
        write_text(folder / MANIFEST, json.dumps(content, indent=1))

    def _unwritten(self, final: Path, error: OSError) -> str:
        """One line: what couldn't be written and why, and what there is to go on from."""
        if isinstance(error, _UnflushedError):
            return (
                f"the checkpoint {final} is written, but can't be flushed to the disk"
                f" ({error.strerror}); see to the disk, then go on with --resume"
                f" {self.folder.parent}"
            )
        file = Path(error.filename).name if error.filename else ""
        what = f"{file}: " if file and _TEMPORARY not in file else ""
        saved = next((item for path in self.folders() if (item := _read_quietly(path))), None)
        return (
            f"the checkpoint {final} can't be written ({what}{error.strerror or error}); "
            + (f"the last whole one is {saved.folder}" if saved else "there is none before it")
            + "; make room, then go on with --resume"
            + (f" {self.folder.parent}" if saved else " auto, which starts afresh")
        )

    def folders(self) -> list[Path]:
        """All checkpoints, intact or not, newest first."""
        if not self.folder.is_dir():
            return []
        found = [
            path for path in self.folder.iterdir() if path.is_dir() and _step(path) is not None
        ]
        return sorted(found, key=lambda path: _step(path) or 0, reverse=True)

    def newest(self, warn: Callable[[str], None]) -> Manifest | None:
        """The newest checkpoint that is whole; `warn` hears of each damaged one passed over.

        Raises:
            ValueError: there are checkpoints, and every one is damaged.
        """
        folders = self.folders()
        for folder in folders:
            try:
                return verify(folder)
            except DamagedCheckpointError as error:
                warn(f"{error}; passed over")
        if folders:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged ({len(folders)} found); start again"
                " with another --output, or remove them"
            )
        return None

    def remove_after(self, step: int) -> list[Path]:
        """Removes the checkpoints past `step`; a run that goes on from there writes them anew."""
        later = [folder for folder in self.folders() if (_step(folder) or 0) > step]
        for folder in later:
            self._discard(folder)
        return later

    def remove_leftovers(self) -> None:
        """Removes what a killed process left half-written or half-removed."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name.startswith((_TEMPORARY, _DISCARDED)):
                shutil.rmtree(path, ignore_errors=True)

    def best(self) -> Manifest | None:
        """The checkpoint with the lowest validation loss, judged by the manifests alone."""
        known = [item for folder in self.folders() if (item := _read_quietly(folder)) is not None]
        measured = [(item.val_loss, item.step, item) for item in known if item.val_loss is not None]
        return min(measured, key=lambda entry: entry[:2])[2] if measured else None

    def _prune(self, newest: Path) -> None:
        best = self.best() if self._keep_best else None
        kept = {newest, *self.folders()[: self._keep]}
        if best is not None:
            kept.add(best.folder)
        for folder in self.folders():
            if folder not in kept:
                self._discard(folder)
        self.remove_leftovers()

    def _discard(self, folder: Path) -> None:
        # Renamed first: a partial checkpoint must never have a checkpoint's name.
        gone = folder.with_name(f"{_DISCARDED}{folder.name}")
        if gone.exists():
            shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{_PREFIX}{step:08d}"


def verify(folder: Path) -> Manifest:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, too short or altered; the message names it.
    """
    content = _read_manifest(folder)
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged: {name} has {size} bytes, not {expected['bytes']}"
            )
        if sha256(path) != expected["sha256"]:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged: the content of {name} does not match its checksum"
            )
    return Manifest(folder, content["step"], content["val_loss"])


@contextlib.contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """Converts what libraries raise for a file that is none of theirs, which are many types.

    Raises:
        DamagedCheckpointError: the file can't be read.
    """
    try:
        yield
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        if is_connection_failure(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise DamagedCheckpointError(
            f"checkpoint {folder} is damaged: {name} can't be read ({type(error).__name__})"
        ) from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("self")
        if stated != _digest(content) or content["step"] != _step(folder):
            raise KeyError("self")
        version = content["format"]
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"checkpoint {folder} is damaged: {MANIFEST} is missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError(
            f"checkpoint {folder} is damaged: {MANIFEST} is not as it was written"
        ) from None
    if version != FORMAT:
        raise ValueError(f"checkpoint {folder} has format {version}; this version reads {FORMAT}")
    checked: dict[str, Any] = content
    return checked


def _read_quietly(folder: Path) -> Manifest | None:
    try:
        content = _read_manifest(folder)
    except ValueError:
        return None
    return Manifest(folder, content["step"], content["val_loss"])


def _step(folder: Path) -> int | None:
    digits = folder.name.removeprefix(_PREFIX)
    named = folder.name.startswith(_PREFIX) and digits.isascii() and digits.isdigit()
    return int(digits) if named else None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
