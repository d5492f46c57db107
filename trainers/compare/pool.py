"""Running a comparison's runs on a few processes; what is finished is kept in its folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..config_io import to_mapping
from .plan import Run
from .worker import DIVERGED, FAILED

Say = Callable[[str], None]
#: In place of the exit status of a run whose worker has ended.
LOST = -1000


class RunError(RuntimeError):
    """A run ended with an error; the message names it and its log."""


@dataclass(frozen=True)
class Outcome:
    """How a run has ended.

    Attributes:
        folder: the run's.
        reason: why it could not go on, "" for a run that reached its last step.
        summary: summary.json, empty where there is a reason.
    """

    folder: Path
    reason: str
    summary: dict[str, Any]

    @property
    def loss(self) -> float:
        """Final validation loss, nats per token; infinite where training broke off."""
        value = self.summary.get("val_loss")
        loss = float(value) if isinstance(value, int | float) else math.inf
        return loss if math.isfinite(loss) else math.inf

    @property
    def broke_off(self) -> bool:
        """Whether it has no final loss."""
        return math.isinf(self.loss)


def outcome(root: Path, run: Run) -> Outcome | None:
    """How a run has ended, None where it hasn't."""
    folder = run.folder(root)
    summary = _read(folder / "summary.json")
    if summary is not None and summary.get("steps") == run.config.train.steps:
        return Outcome(folder, "", summary)
    failed = _read(folder / FAILED)
    return None if failed is None else Outcome(folder, str(failed.get("reason", "")), {})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


class _Worker:
    """A process of `worker`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # A session of its own: Ctrl-C is for the comparison, which then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )

    def run(self, request: dict[str, Any]) -> int:
        """Has it run something; its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return LOST
        answer = self._process.stdout.readline()
        return int(json.loads(answer)["status"]) if answer else LOST

    def close(self) -> None:
        """Ends its input, on which a run at work saves itself."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def join(self) -> None:
        """Waits for its end."""
        self._process.wait()


class Pool:
    """Worker processes, and the runs that they carry out.

    Args:
        root: the comparison's folder.
        jobs: processes.
        say: told of each run.
        keep_checkpoints: whether finished runs keep their last checkpoint.
    """

    def __init__(self, root: Path, jobs: int, say: Say, keep_checkpoints: bool = False) -> None:
        self.root = root
        self.jobs = jobs
        self._say = say
        self._keep = keep_checkpoints
        self._workers: list[_Worker] = []
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="run")
        self._closing = False
        self.failed: dict[str, str] = {}

    def run_all(self, runs: Iterable[Run]) -> dict[str, Outcome]:
        """Carries out the runs that haven't ended yet.

        Returns:
            The outcome by key of each run that has ended; one that failed otherwise than by
            diverging is in `failed` instead, and is tried again the next time.
        """
        every = {run.key: run for run in runs}
        done: dict[str, Outcome] = {}
        for key, run in every.items():
            found = outcome(self.root, run)
            if found is not None:
                done[key] = found
        missing = [run for key, run in every.items() if key not in done]
        futures: dict[Future[float], Run] = {}
        for run in missing:
            futures[self._threads.submit(self._carry_out, run)] = run
        waiting = set(futures)
        for count in range(1, len(missing) + 1):
            finished, waiting = self._first(waiting)
            run = futures[finished]
            self._tell(run, finished, f"[{count}/{len(missing)}]", done)
        return done

    def _first(self, waiting: set[Future[float]]) -> tuple[Future[float], set[Future[float]]]:
        ready: set[Future[float]] = set()
        while not ready:
            # In short waits, so that a signal is heard.
            ready, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        one = next(iter(ready))
        return one, waiting - {one}

    def _tell(self, run: Run, future: Future[float], count: str, done: dict[str, Outcome]) -> None:
        name = f"{run.entry.label}, seed {run.seed}, lr {run.config.optimizer.lr:g}"
        try:
            seconds = future.result()
        except RunError as error:
            self.failed[run.key] = str(error)
            self._say(f"{count} {name}: {error}")
            return
        found = outcome(self.root, run)
        if found is None:
            self.failed[run.key] = f"it left no summary; see {self._log(run)}"
            self._say(f"{count} {name}: {self.failed[run.key]}")
            return
        done[run.key] = found
        ended = f"broke off ({found.reason})" if found.reason else f"loss {found.loss:.4f}"
        self._say(f"{count} {name}: {ended} in {seconds:.0f} s")

    def _log(self, run: Run) -> Path:
        return self.root / "logs" / f"{run.key}.log"

    def _carry_out(self, run: Run) -> float:
        """In a thread: hands a run to a free worker and waits for its end."""
        if self._closing:
            raise RunError("not begun")
        start = time.monotonic()
        worker = self._take()
        status = worker.run(
            {
                "folder": str(run.folder(self.root)),
                "log": str(self._log(run)),
                "settings": to_mapping(run.config),
                "keep_checkpoints": self._keep,
            }
        )
        if not self._closing:
            self._free.put(worker if status != LOST else self._start())
        if status not in (0, DIVERGED):
            raise RunError(self._why(run, status))
        return time.monotonic() - start

    def _why(self, run: Run, status: int) -> str:
        log = self._log(run)
        lines = log.read_text("utf-8", errors="replace").split("\n") if log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        if status == LOST:
            return f"its worker has ended; see {log}"
        if status < 0:
            return f"its process was killed (signal {-status}); see {log}"
        return f"{last.strip() or f'ended with status {status}'}; see {log}"

    def _take(self) -> _Worker:
        if len(self._workers) < self.jobs and self._free.empty():
            return self._start()
        return self._free.get()

    def _start(self) -> _Worker:
        worker = _Worker()
        self._workers.append(worker)
        if self._closing:
            worker.close()
        return worker

    def close(self) -> None:
        """Ends the workers; runs at work are saved."""
        self._closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()
        self._threads.shutdown(wait=True)


@contextmanager
def open_pool(root: Path, jobs: int, say: Say, keep_checkpoints: bool = False) -> Iterator[Pool]:
    """A pool that is closed in any case."""
    pool = Pool(root, jobs, say, keep_checkpoints)
    try:
        yield pool
    finally:
        pool.close()
