"""Faults while several processes write one checkpoint under FSDP2: the last good one stays."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from faults import DEATH, DIED, POWER
from processes import Job, Outcome, run_jobs
from tiny_runs import TINY, comparable_metrics, summary

from lowrank.trainers.checkpoint import CheckpointStore, verify

pytestmark = pytest.mark.exhaustive

STEPS, BEFORE, DISTURBED = 6, 2, 4
#: By name: the rank, and the call of it that fails while the second checkpoint is written.
FAULTS: dict[str, tuple[str, str, int, int | str]] = {
    "a part's file": ("1", "open", 0, errno.ENOSPC),
    "a part's content": ("1", "write", 1, errno.EIO),
    "a part's flush": ("1", "fsync", 0, errno.EIO),
    "a part's writer dies": ("1", "write", 0, DEATH),
    "the index": ("0", "rename", 0, errno.ENOSPC),
    "the weights": ("0", "write", 1, errno.ENOSPC),
    "the counters' writer dies": ("0", "fsync", 3, POWER),
    "the name": ("0", "mkdir", 0, errno.ENOSPC),
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """A run that nothing disturbs; each fault; and a run that goes on after it."""
    base = tmp_path_factory.mktemp("runs")

    def arguments(name: str) -> list[str]:
        flags = [f"--output={base / name}", f"--steps={STEPS}", f"--data={corpus}", "--resume=auto"]
        settings = ("distributed.strategy=fsdp2", "distributed.timeout=20", "eval.every=0")
        return ["pretrain", *flags, *TINY, *settings, "checkpoint.every=2", "checkpoint.keep=1"]

    jobs = {"whole": Job(arguments("whole"), 2)}
    for name, (rank, *call) in FAULTS.items():
        folder = name.replace(" ", "-")
        fault = (DISTURBED, call[0], call[1], call[2])
        jobs[name] = Job(arguments(folder), 2, faults={rank: fault})
        kept = (str(base / folder), str(base / f"{folder}-left"))
        jobs[f"{name}, resumed"] = Job(arguments(folder), 2, copied=kept)
    outcomes = dict(zip(jobs, run_jobs(list(jobs.values()), base / "jobs"), strict=True))
    return base, outcomes


@pytest.mark.parametrize("name", FAULTS)
def test_a_ranks_fault_is_one_line_and_the_run_goes_on(
    name: str, runs: tuple[Path, dict[str, Outcome]]
) -> None:
    base, outcomes = runs
    rank, *_, kind = FAULTS[name]
    outcome, folder = outcomes[name], base / name.replace(" ", "-")
    others = [status for at, status in enumerate(outcome.statuses) if str(at) != rank]
    assert others == [1]
    assert outcome.statuses[int(rank)] == (DIED if isinstance(kind, str) else 1)
    told = [line for text in outcome.errors for line in text.splitlines()]
    told = [line for line in told if line.startswith(("lowrank:", "Traceback"))]
    assert len(told) == 1, outcome.errors
    if not isinstance(kind, str):
        assert f"step-{DISTURBED:08d} can't be written" in told[0]
        assert f"the last whole one is {folder}/checkpoints/step-{BEFORE:08d}" in told[0]
    left = base / f"{folder.name}-left" / "checkpoints"
    found = CheckpointStore(left, keep=1, keep_best=False).folders()
    assert [verify(path).step for path in found] == [BEFORE]
    again = outcomes[f"{name}, resumed"]
    assert again.statuses == [0, 0], again.errors
    assert summary(folder)["weights_sha256"] == summary(base / "whole")["weights_sha256"]
    assert comparable_metrics(folder) == comparable_metrics(base / "whole")
