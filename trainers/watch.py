"""Whether the other processes of a run still live, and one line about one that doesn't.

Each process has a thread that counts up a number in the store through which the processes found
each other, and watches the next process's number. A process that was killed is noticed at once
where its connections break (gloo), and after `distributed.timeout` in any case: also where the
main thread waits for a GPU whose kernels wait for the lost process.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: Seconds between two counts, at most.
INTERVAL = 0.5
#: Seconds that the main thread has to end by itself once a process is known to be lost.
GRACE = 5.0
EXIT_LOST = 1


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or no longer answers; the message is one line."""


class Watch:
    """Tells the others that this process lives, and finds out who doesn't.

    Args:
        connect: opens a connection to the processes' store.
        rank: this process's number.
        size: number of processes.
        timeout: seconds of silence after which a process counts as lost.
        hosted: whether the store lives in rank 0's process, as without torchrun.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        size: int,
        timeout: float,
        *,
        hosted: bool = False,
    ) -> None:
        # One connection each: a store serves one call at a time.
        self._beats, self._store = connect(), connect()
        self._rank, self._size, self._timeout = rank, size, timeout
        self._hosted = hosted
        self._interval = min(INTERVAL, timeout / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lowrank-watch", daemon=True)

    def __enter__(self) -> Self:
        self._store.set(_name(self._rank), f"{socket.gethostname()}, process {os.getpid()}")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(RuntimeError):
                self._store.set(_end(self._rank), type(error).__name__)
            if self._hosted and self._rank == 0:
                self._linger()
        self._ended.set()
        self._thread.join(timeout=GRACE)

    def _linger(self) -> None:
        """Keeps the store until the others had time to read in it what happened."""
        limit = time.monotonic() + 2 * GRACE
        while time.monotonic() < limit:
            before = [_count(self._store, rank) for rank in range(1, self._size)]
            time.sleep(4 * self._interval)
            after = [_count(self._store, rank) for rank in range(1, self._size)]
            if before == after:
                return

    def first(self, text: str) -> bool:
        """Whether no process has said this text yet; from now on this one has."""
        key = f"said/{hashlib.sha256(text.encode()).hexdigest()}"
        try:
            return int(self._store.add(key, 1)) == 1
        except RuntimeError:
            return True  # Without the store twice is better than never.

    def first_here(self, topic: str) -> bool:
        """Whether no process of this machine has spoken of a topic yet; from now on it has."""
        return self.first(f"{topic} on {socket.gethostname()}")

    def explain(self, reason: str) -> str:
        """One line about a connection that failed: which processes are lost.

        Takes a few intervals, in which those that live are heard of. The first process that comes
        to a conclusion tells the others, which may fail only because that one then ends.

        Args:
            reason: of the failure, for where no process turns out to be silent.
        """
        others = [rank for rank in range(self._size) if rank != self._rank]
        try:
            if not self._store.check([_VERDICT]):
                before = {rank: _count(self._store, rank) for rank in others}
                time.sleep(4 * self._interval)
                silent = [rank for rank in others if _count(self._store, rank) == before[rank]]
                ended = [rank for rank in others if self._store.check([_end(rank)])]
                lost = [rank for rank in silent if rank not in ended]
                self._conclude(self._line(lost, ended, reason))
            return self._store.get(_VERDICT).decode()
        except RuntimeError:
            holder = "rank 0" if self._hosted else "torchrun"
            return f"{holder}, which holds the processes' store, has ended"

    def _line(self, lost: list[int], ended: list[int], reason: str) -> str:
        if lost:
            verb = "have" if len(lost) > 1 else "has"
            return f"{self._named(lost)} of {self._size} {verb} ended or stopped answering"
        if ended:
            return f"{self._named(ended)} of {self._size} ended after an error"
        return f"the connection to another process failed ({reason})"

    def _named(self, ranks: list[int]) -> str:
        return " and ".join(
            f"rank {rank} ({self._store.get(_name(rank)).decode()})" for rank in ranks
        )

    def _conclude(self, line: str) -> None:
        if int(self._store.add(f"{_VERDICT}/count", 1)) == 1:
            self._store.set(_VERDICT, line)

    def _run(self) -> None:
        """The thread: counts, and watches the next process."""
        watched = (self._rank + 1) % self._size
        seen, since, count = -1, time.monotonic(), 0
        while not self._ended.wait(self._interval):
            count += 1
            try:
                self._beats.set(_beat(self._rank), str(count))
                found = _count(self._beats, watched)
                concluded = self._beats.check([_VERDICT])
            except RuntimeError:
                return  # The store's end is the main thread's to notice: it may be the run's.
            if found != seen:
                seen, since = found, time.monotonic()
            if concluded or time.monotonic() - since > self._timeout:
                self._give_up(watched)
                return

    def _give_up(self, watched: int) -> None:
        """Ends this process unless the main thread does."""
        line = f"rank {watched} of {self._size} has not answered for {self._timeout:g} seconds"
        with suppress(RuntimeError):
            if not self._beats.check([_VERDICT]):
                self._conclude(line)
            line = self._beats.get(_VERDICT).decode()
        # Longer than the main thread takes to explain.
        if self._ended.wait(GRACE + 4 * self._interval):
            return
        with suppress(RuntimeError):
            self._store.set(_end(self._rank), "silence")
        if self.first_here(LOST):
            # A progress bar may have hidden the cursor.
            shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""
            sys.stderr.write(f"{shown}lowrank: {line}; {ADVICE}\n")
            sys.stderr.flush()
        os._exit(EXIT_LOST)


#: The topic of lines about lost processes.
LOST = "lost"
_VERDICT = "verdict"
ADVICE = "go on from the last checkpoint with --resume auto, on any number of processes that fits"


def connections(address: str, port: int, prefix: str) -> Callable[[], Store]:
    """Opens connections to the store at an address."""

    def connect() -> Store:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]

    return connect


def is_connection_failure(error: BaseException) -> bool:
    """Whether an error of torch says that processes couldn't exchange something."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _end(rank: int) -> str:
    return f"end/{rank}"


def _name(rank: int) -> str:
    return f"name/{rank}"


def _count(store: Store, rank: int) -> int:
    return int(store.get(_beat(rank))) if store.check([_beat(rank)]) else -1
