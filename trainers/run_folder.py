"""Where a run lives, and from which checkpoint it goes on."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CheckpointStore, Manifest, verify

AUTO = "auto"
RUNS = Path("runs")
_TRACES = ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints")


@dataclass(frozen=True)
class Place:
    """A run's folder and the checkpoint to go on from, None to start afresh.

    Attributes:
        folder: exists.
        checkpoint: whole, as verified.
        restarts: whether a run was begun here and left nothing to go on from.
    """

    folder: Path
    checkpoint: Manifest | None
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
        ValueError: the folder holds a run and `resume` is None, or there is nothing to resume.
    """
    if resume is None:
        folder = output if output is not None else _fresh(name)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {folder} is a file; accepted: a folder")
        if _holds_run(folder):
            raise ValueError(
                f"{folder} already holds a run; go on with it (--resume auto) or choose another"
                " --output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        return Place(folder, None)
    if resume == AUTO:
        folder = output if output is not None else _latest(name) or _fresh(name)
        folder.mkdir(parents=True, exist_ok=True)
        return Place(folder, _newest(folder, warn), restarts=_holds_run(folder))
    return _explicit(Path(resume), output, warn)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process, so that two runs never write into one folder.

    The lock is the operating system's: it ends with the process, however that ends. A folder in
    which no run was begun is removed again.

    Raises:
        ValueError: another process holds the folder.
    """
    path = folder / ".lock"
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run that is still going") from None
        try:
            yield
        finally:
            if {item.name for item in folder.iterdir()} == {path.name}:
                path.unlink()
                folder.rmdir()


def store_of(folder: Path, *, keep: int = 1, keep_best: bool = True) -> CheckpointStore:
    """The checkpoints of a run's folder."""
    return CheckpointStore(folder / "checkpoints", keep=keep, keep_best=keep_best)


def _explicit(asked: Path, output: Path | None, warn: Callable[[str], None]) -> Place:
    if not asked.is_dir():
        raise ValueError(f"--resume {asked} is not a folder; accepted: auto, a run or a checkpoint")
    single = asked.parent.name == "checkpoints" or (asked / "manifest.json").is_file()
    folder = asked.resolve().parent.parent if single else asked
    if output is not None and output.resolve() != folder.resolve():
        raise ValueError(
            f"--output {output} is not the run to resume, {folder}; leave --output away"
        )
    checkpoint = verify(asked.resolve()) if single else _newest(folder, warn)
    if checkpoint is None:
        raise ValueError(f"--resume {asked}: there is no checkpoint to resume from")
    return Place(folder, checkpoint)


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
