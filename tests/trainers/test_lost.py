"""A process that is gone: the others end soon, with one line that names it."""

from __future__ import annotations

import re
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import PRELOAD as PRELOAD
from processes import Job, Outcome, free_port, run_jobs
from tiny_runs import TINY

from lowrank.trainers import watch
from lowrank.trainers.distributed import join
from lowrank.trainers.watch import ADVICE, LostProcessError, Watch, is_connection_failure

#: By name: which rank gets which signal at the start of the step after 2.
SIGNALS = {
    "killed": ("1", signal.SIGKILL),
    "the first killed": ("0", signal.SIGKILL),
    "stopped": ("1", signal.SIGSTOP),
    "asked to end": ("1", signal.SIGTERM),
    "interrupted": ("1", signal.SIGINT),
}


@pytest.fixture(scope="module")
def outcomes(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    base = tmp_path_factory.mktemp("lost")
    jobs = []
    for name, (rank, number) in SIGNALS.items():
        flags = [f"--output={base / name}", "--steps=8", f"--data={corpus}"]
        settings = [*TINY, "distributed.timeout=3"]
        jobs.append(Job(["pretrain", *flags, *settings], 3, {rank: (2, int(number))}))
    return dict(zip(SIGNALS, run_jobs(jobs, base / "jobs"), strict=True))


def own_lines(outcome: Outcome) -> list[str]:
    """What is told in all, without the log of torch's own connections."""
    lines = [line for error in outcome.errors for line in error.splitlines()]
    return [line for line in lines if line.startswith(("lowrank:", "warning:", "Traceback"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "the first killed", "stopped"])
def test_the_others_end_with_one_line(name: str, outcomes: dict[str, Outcome]) -> None:
    lost, _ = SIGNALS[name]
    outcome = outcomes[name]
    others = [status for rank, status in enumerate(outcome.statuses) if str(rank) != lost]
    assert others == [1, 1]
    assert outcome.seconds < 15
    told = own_lines(outcome)
    if name == "the first killed":
        # With it the store is gone, in which one process would have told the other.
        assert set(told) == {
            f"lowrank: rank 0, which holds the processes' store, has ended; {ADVICE}"
        }
        return
    assert len(told) == 1, told
    assert told[0].startswith(f"lowrank: rank {lost} ")
    assert told[0].endswith(ADVICE)


@pytest.mark.slow
def test_processes_that_one_asks_to_end_save_and_end_together(
    outcomes: dict[str, Outcome],
) -> None:
    outcome = outcomes["asked to end"]
    assert outcome.statuses == [143] * 3
    told = own_lines(outcome)
    assert len(told) == 1, told
    assert "ended by SIGTERM after step 3; saved" in told[0]


@pytest.mark.slow
def test_an_interruption_is_told_once(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["interrupted"]
    assert sorted(outcome.statuses) == [1, 1, 130]
    assert own_lines(outcome) == [
        "lowrank: interrupted; what was saved can be resumed with --resume"
    ]


class _Store:
    """A store in memory that several threads may use, each key under a prefix of its own."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            value = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(value).encode()
        return value


def test_silent_processes_are_named_and_living_ones_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0.1)
    store: Any = _Store()
    first, second, third = (Watch(lambda: store, rank, 3, 60.0) for rank in range(3))
    with first, second:
        with third:
            pass
        line = first.explain("reset")
        assert second.explain("another reset") == line
    assert re.fullmatch(r"rank 2 \(.+, process \d+\) of 3 has ended or stopped answering", line)


def test_processes_that_fail_by_themselves_are_named_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0.1)
    store: Any = _Store()
    first, second = (Watch(lambda: store, rank, 2, 60.0) for rank in range(2))
    with first:
        with pytest.raises(KeyError), second:
            raise KeyError
        line = first.explain("reset")
    assert re.fullmatch(r"rank 1 \(.+, process \d+\) of 2 ended after an error", line)


def test_living_processes_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 0.1)
    store: Any = _Store()
    first, second = (Watch(lambda: store, rank, 2, 60.0) for rank in range(2))
    with first, second:
        line = first.explain("reset")
    assert line == "the connection to another process failed (reset)"


def test_a_text_is_said_by_one() -> None:
    store: Any = _Store()
    first, second = (Watch(lambda: store, rank, 2, 60.0) for rank in range(2))
    assert first.first("a")
    assert not second.first("a")
    assert second.first("b")


def test_a_store_that_is_gone_is_named() -> None:
    class Gone(_Store):
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("gone")

    store: Any = Gone()
    assert Watch(lambda: store, 0, 2, 1.0).explain("reset").startswith("torchrun, which holds")


def test_failures_of_connections_are_known_from_others() -> None:
    assert is_connection_failure(dist.DistBackendError("NCCL error"))
    assert is_connection_failure(
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1")
    )
    assert not is_connection_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_connection_failure(ValueError("Connection closed by peer"))
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=1))
    with pytest.raises(dist.DistStoreError) as told:
        store.get("nothing")
    assert is_connection_failure(told.value)


@pytest.mark.slow
def test_a_process_that_finds_no_others_says_where_it_looked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = str(free_port())
    environment = {
        "RANK": "1",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = rf"^rank 1 doesn't reach the other 2 process\(es\) through 127\.0\.0\.1:{port} "
    with pytest.raises(LostProcessError, match=text), join("cpu", environment, timeout=1):
        pass
