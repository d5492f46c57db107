"""Running many jobs on a few processes, each result kept as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import versions

from .entrants import OPTIONS
from .run import Job, data_hash, run
from .setting import Setting

Record = dict[str, Any]


def fingerprint(setting: Setting) -> str:
    """What a result depends on beside its job: setting, options, data and versions."""
    content = [setting.as_dict() | {"data": None}, dict(OPTIONS), data_hash(setting), versions()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ledger:
    """Finished runs, one JSON line each, so that an interrupted comparison goes on.

    Attributes:
        path: of the file; it is made with the first result.
        setting: only its runs are read.
        mark: `fingerprint` of the setting.
    """

    path: Path
    setting: Setting
    mark: str

    def read(self) -> dict[Job, Record]:
        """The finished runs of this setting; a line that broke off is passed over."""
        found: dict[Job, Record] = {}
        if not self.path.exists():
            return found
        for line in self.path.read_text("utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record.get("mark") == self.mark:
                job = Job(record["name"], record["lr"], record["plain_lr"], record["seed"])
                found[job] = record
        return found

    def add(self, record: Record) -> None:
        """Appends one finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        broken = bool(content) and not content.endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if broken else "") + json.dumps(record | {"mark": self.mark}) + "\n")


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Worker processes that keep their data between runs."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def run_all(
    ledger: Ledger, jobs: Iterable[Job], executor: Executor, progress: Callable[[str], None]
) -> dict[Job, Record]:
    """Runs what the ledger lacks; all results that it then has.

    Args:
        ledger: where results are kept.
        jobs: what is wanted.
        executor: runs them; each run takes one torch thread.
        progress: told of each finished run.
    """
    done = ledger.read()
    missing: Sequence[Job] = [job for job in dict.fromkeys(jobs) if job not in done]
    futures = {executor.submit(run, ledger.setting, job): job for job in missing}
    for count, future in enumerate(as_completed(futures), start=1):
        record, job = future.result(), futures[future]
        ledger.add(record)
        done[job] = record
        progress(
            f"[{count}/{len(missing)}] {job.name} (lr={job.lr:g}, plain_lr={job.plain_lr:g}, "
            f"seed={job.seed}): {record['val_loss']:.4f} in {record['seconds']:.0f} s"
        )
    return done
