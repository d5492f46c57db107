"""Sections as processes of their own, so that none stops another; needs no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import Json, read, write

#: Exit statuses of a section.
NO_DEVICE, DEVICE_LOST = 2, 3
#: Seconds without news after which a section is taken to hang.
STALL = 45.0
#: Seconds that a section has to end in after it was asked to.
GRACE = 3.0
#: How often a section is taken up again after its process ended early.
RESTARTS = 4


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        section: name.
        path: of the file it writes.
        limit: seconds until it is ended.
        command: with its arguments; `--seconds` and, where it goes on, `--resume` are added.
        stalls: whether it has to write its file at least every `STALL` seconds.
    """

    section: str
    path: Path
    limit: float
    command: Sequence[str]
    stalls: bool = True


def run(job: Job) -> tuple[Json, int]:
    """Runs a section to its end or limit; takes it up again where its process broke down.

    Returns:
        The content of its file, whose "state" is one of complete, "out of time", killed, broken;
        and the exit status of its last process.

    Raises:
        KeyboardInterrupt: after the section was ended; its file has what was found.
    """
    job.path.unlink(missing_ok=True)
    end = time.monotonic() + job.limit
    for attempt in range(1 + RESTARTS):
        seconds = end - time.monotonic()
        status, why = _process(job, seconds, resume=attempt > 0 and job.path.exists())
        content = read(job.path)
        if status == NO_DEVICE or content.get("state") in ("complete", "out of time"):
            return content, status
        if why == "limit":
            return _finish(job, content, "out of time", None), status
        stuck = content.get("current")
        message = why or f"the process ended with status {status}"
        content = _finish(job, content, "broken", f"{message}, at {stuck or 'its start'}")
        if end - time.monotonic() < 5.0 or (stuck is None and status != DEVICE_LOST):
            break
        print(f"  {job.section} is taken up again after {stuck!r}: {message}", flush=True)
    return content, status


def _process(job: Job, seconds: float, *, resume: bool) -> tuple[int, str]:
    """One process; returns its exit status, and why it was ended if it was."""
    command = [*job.command, "--seconds", f"{max(seconds - GRACE, 1.0):.1f}"]
    if resume:
        command.append("--resume")
    begin = time.time()
    child = subprocess.Popen(command, start_new_session=True)
    why = ""
    try:
        while child.poll() is None:
            time.sleep(0.1)
            now = time.time()
            if now - begin > seconds:
                why = "limit"
            elif job.stalls and now - max(begin, _changed(job.path)) > STALL:
                why = f"no news in {STALL:g} s: killed"
            if why:
                _end(child, 0.0 if why != "limit" else GRACE)
    except KeyboardInterrupt:
        _end(child, GRACE)
        _finish(job, read(job.path), "interrupted", None)
        raise
    return child.returncode, why


def _end(child: subprocess.Popen[bytes], patience: float) -> None:
    """Interrupts a section, and kills it and its compilers if that does not help."""
    with contextlib.suppress(ProcessLookupError):
        if patience:
            os.killpg(child.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _finish(job: Job, content: Json, state: str, error: str | None) -> Json:
    """Says in the file how the section ended."""
    empty: Json = {name: [] for name in ("checks", "rows", "skipped", "errors", "done")}
    empty |= {"section": job.section, "seconds": 0.0, "facts": {}, "current": None}
    content = empty | content
    content["state"] = state
    if error is not None:
        found = {"where": content["current"] or job.section, "message": error, "traceback": ""}
        content["errors"].append(found)
        print(f"  ERROR in {job.section}: {error}", flush=True)
    elif content["current"] is not None:
        content["skipped"].append({"what": content["current"], "why": state})
    write(job.path, content)
    return content
