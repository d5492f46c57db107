"""Where a run lives, and from which checkpoint it goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import CheckpointStore, Manifest, verify

AUTO = "auto"
RUNS = Path("runs")
_CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_REPORT = "report.html"
_TRACES = ("config.yaml", "metrics.jsonl", "summary.json", _CHECKPOINTS)


@dataclass(frozen=True)
class Place:
    """A run's folder and the checkpoint to go on from, None to start afresh.

    Attributes:
        folder: exists.
        checkpoint: whole, as verified.
        made: folders that were made for the run, the outermost first.
        restarts: whether a run was begun here and left nothing to go on from.
    """

    folder: Path
    checkpoint: Manifest | None
    made: tuple[Path, ...] = ()
    restarts: bool = False


def find_place(
    name: str, output: Path | None, resume: str | None, warn: Callable[[str], None]
) -> Place:
    """Decides where a run lives and from where it goes on; makes the folder.

    Args:
        name: of the run, for the default folder ``runs/NAME-001`` and so on.
        output: the folder asked for, None for the default.
        resume: None to start afresh, "auto" for the newest whole checkpoint in the folder if there
            is one, or a run's folder or one checkpoint.
        warn: hears of damaged checkpoints that are passed over.

    Raises:
        ValueError: the folder holds a run and `resume` is None, there is nothing to resume, or
            something that is no run's stands where its files have to be.
        OSError: the folder can't be made.
    """
    if resume is None:
        folder = output if output is not None else _fresh(name)
        _check_kinds(folder)
        if _holds_run(folder):
            raise ValueError(
                f"{folder} already holds a run; go on with it (--resume auto) or choose another"
                " --output"
            )
        return Place(folder, None, _make(folder))
    if resume == AUTO:
        folder = output if output is not None else _latest(name) or _fresh(name)
        _check_kinds(folder)
        begun = _holds_run(folder)
        return Place(folder, _newest(folder, warn), _make(folder), restarts=begun)
    return _explicit(Path(resume), output, warn)


def absolute(place: Place) -> Place:
    """The same place for processes in other working folders."""
    checkpoint = place.checkpoint
    if checkpoint is not None:
        checkpoint = replace(checkpoint, folder=Path(os.path.abspath(checkpoint.folder)))
    folder = Path(os.path.abspath(place.folder))
    return replace(place, folder=folder, checkpoint=checkpoint)


@contextlib.contextmanager
def hold(folder: Path, made: Sequence[Path] = ()) -> Iterator[None]:
    """Holds `folder` for this process, so that two runs never write into one folder.

    The lock is the operating system's: it ends with the process, however that ends. Where no run
    was begun, the lock's file and the folders that were made for the run are removed again.

    Args:
        folder: exists.
        made: folders that were made for the run, the outermost first.

    Raises:
        ValueError: another process holds the folder.
    """
    path = folder / _LOCK
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run that is still going") from None
        try:
            yield
        finally:
            if not _holds_run(folder):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    for item in reversed(made):
                        item.rmdir()


def store_of(folder: Path, *, keep: int = 1, keep_best: bool = True) -> CheckpointStore:
    """The checkpoints of a run's folder."""
    return CheckpointStore(folder / _CHECKPOINTS, keep=keep, keep_best=keep_best)


def _make(folder: Path) -> tuple[Path, ...]:
    """Makes a folder and those above it; which ones there weren't, the outermost first."""
    missing = [item for item in (folder, *folder.parents) if not item.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {folder} can't be made: {error.strerror or error}") from error
    return tuple(reversed(missing))


def _check_kinds(folder: Path) -> None:
    """Refuses a folder in which a run's files can't be: found now, not after hours of training."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; accepted: a folder")
    for name in (*_TRACES, _REPORT, _LOCK):
        path, wanted = folder / name, "folder" if name == _CHECKPOINTS else "file"
        if path.exists() and path.is_dir() != (wanted == "folder"):
            raise ValueError(
                f"{path} is not a {wanted}, as it is in a run's folder; move it away or choose"
                " another --output"
            )


def _explicit(asked: Path, output: Path | None, warn: Callable[[str], None]) -> Place:
    if not asked.is_dir():
        raise ValueError(f"--resume {asked} is not a folder; accepted: auto, a run or a checkpoint")
    single = asked.parent.name == _CHECKPOINTS or (asked / "manifest.json").is_file()
    folder = resolved(asked).parent.parent if single else asked
    if output is not None and resolved(output) != resolved(folder):
        raise ValueError(
            f"--output {output} is not the run to resume, {folder}; leave --output away"
        )
    _check_kinds(folder)
    checkpoint = verify(resolved(asked)) if single else _newest(folder, warn)
    if checkpoint is None:
        raise ValueError(f"--resume {asked}: there is no checkpoint to resume from")
    return Place(folder, checkpoint)


def resolved(path: Path) -> Path:
    """`Path.resolve`, which in some versions of Python raises for a link to itself."""
    return Path(os.path.realpath(path))


def _newest(folder: Path, warn: Callable[[str], None]) -> Manifest | None:
    return store_of(folder).newest(warn)


def _holds_run(folder: Path) -> bool:
    return any((folder / trace).exists() for trace in _TRACES)


def _numbered(name: str) -> dict[int, Path]:
    """The folders ``runs/NAME-NNN`` that exist, by number."""
    found = {}
    for path in RUNS.glob(f"{name}-*"):
        digits = path.name.removeprefix(f"{name}-")
        if digits.isascii() and digits.isdigit() and path.is_dir():
            found[int(digits)] = path
    return found


def _fresh(name: str) -> Path:
    return RUNS / f"{name}-{max(_numbered(name), default=0) + 1:03d}"


def _latest(name: str) -> Path | None:
    found = _numbered(name)
    return found[max(found)] if found else None
