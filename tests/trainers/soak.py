"""A long run, disturbed again and again, against the straight one.

    OMP_NUM_THREADS=1 python tests/trainers/soak.py --steps 2000 --faults 20

SIGKILL, SIGTERM and a disk that becomes full, drawn with their moments from a seed, end the run;
each time `--resume auto` goes on. At the end weights, metrics and summary must be those of the run
that nothing disturbed. Prints what happened as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from faults import Disk
from tiny_runs import TINY, comparable_metrics, summary, write_corpus

from lowrank.trainers import pretrain
from lowrank.trainers.checkpoint import verify
from lowrank.trainers.cli import main

KILL, TERM, FULL = "SIGKILL", "SIGTERM", "disk full"
ENDS = {KILL: -signal.SIGKILL, TERM: 143, FULL: 1}
#: Calls that change files until the disk is full: from the first step's to some checkpoints later.
FEWEST_CALLS, MOST_CALLS = 20, 600
#: What of a summary depends on the time it took.
TIMED = ("wall_seconds", "tokens_per_second", "peak_memory_bytes")
PATIENCE = 600


def start(arguments: Sequence[str], folder: Path, calls: int | None = None) -> int:
    """Forks a process of the command, whose disk is full after so many calls; its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(folder.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, descriptor)
        disk = Disk(folder, calls, errno.ENOSPC, lasting=True)
        with disk.watched() if calls is not None else contextlib.nullcontext():
            status = main([*arguments, f"--output={folder}", "--resume=auto"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def steps_done(folder: Path) -> int:
    """The last step of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            return int(json.loads(line)["step"])
    return 0


def ended(child: int) -> int | None:
    """A child's exit status, None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def disturb(
    arguments: Sequence[str], folder: Path, kind: str, step: int, source: random.Random
) -> dict[str, Any]:
    """Runs the command until a fault ends it, or to its end; what happened."""
    before = steps_done(folder)
    calls = source.randint(FEWEST_CALLS, MOST_CALLS) if kind == FULL else None
    child = start(arguments, folder, calls)
    status, sent, limit = None, False, time.monotonic() + PATIENCE
    while status is None:
        time.sleep(0.003)
        assert time.monotonic() < limit, f"{kind} did not end the run"
        if kind != FULL and not sent and steps_done(folder) >= step:
            time.sleep(source.random() * 0.02)  # anywhere in a step, an evaluation or a checkpoint
            os.kill(child, getattr(signal, kind))
            sent = True
        status = ended(child)
    assert status in (0, ENDS[kind]), f"{kind}: {folder.with_suffix('.err').read_text()[-2000:]}"
    return {"kind": kind, "from": before, "to": steps_done(folder), "status": status}


def soak(base: Path, steps: int, faults: int, seed: int, optimizer: str) -> dict[str, Any]:
    """The straight run and the disturbed one; figures.

    Raises:
        AssertionError: they don't end alike.
    """
    pretrain.write_report = lambda folder: folder / "report.html"
    torch.set_num_threads(1)
    corpus, source = write_corpus(base / "corpus"), random.Random(seed)
    flags = [f"--steps={steps}", f"--optimizer={optimizer}", f"--data={corpus}"]
    settings = ("checkpoint.every=25", "eval.every=100")
    arguments = ["pretrain", *flags, *TINY, *settings]
    straight, disturbed = base / "straight", base / "disturbed"
    began = time.monotonic()
    child = start(arguments, straight)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    alone = time.monotonic() - began
    kinds = [(KILL, TERM, FULL)[number % 3] for number in range(faults)]
    source.shuffle(kinds)
    moments = sorted(source.sample(range(1, steps), faults))
    happened = [
        disturb(arguments, disturbed, kind, step, source)
        for kind, step in zip(kinds, moments, strict=True)
    ]
    last = os.waitstatus_to_exitcode(os.waitpid(start(arguments, disturbed), 0)[1])
    assert last == 0, disturbed.with_suffix(".err").read_text()[-2000:]
    compare(straight, disturbed)
    told = disturbed.with_suffix(".err").read_text().splitlines()
    ends = [item for item in happened if item["status"]]
    assert all(line.startswith(("lowrank: ", "warning: ")) for line in told), told
    return {
        "steps": steps,
        "optimizer": optimizer,
        "seed": seed,
        "ended by": {kind: sum(item["kind"] == kind for item in ends) for kind in ENDS},
        "lines told": len(told),
        "weights_sha256": summary(disturbed)["weights_sha256"],
        "straight seconds": round(alone, 1),
        "seconds": round(time.monotonic() - began, 1),
        "happened": happened,
    }


def compare(straight: Path, disturbed: Path) -> None:
    """Raises `AssertionError` unless two runs have ended alike, and left nothing half-written."""
    one, other = summary(straight), summary(disturbed)
    assert one["weights_sha256"] == other["weights_sha256"]
    differing = [key for key in one | other if one.get(key) != other.get(key)]
    assert set(differing) <= {*TIMED}, differing
    assert comparable_metrics(straight) == comparable_metrics(disturbed)
    last = f"step-{one['steps']:08d}"
    left = [files_of(folder, last) for folder in (straight, disturbed)]
    assert left[0] == left[1], left[0] ^ left[1]
    for folder in (disturbed / "checkpoints").iterdir():
        verify(folder)


def files_of(folder: Path, last: str) -> set[str]:
    """Names of a run's files; which checkpoints but the last it keeps depends on how it went."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    return {str(p) for p in paths if p.parts[0] != "checkpoints" or last in p.parts}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--optimizer", default="galore_adamw")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = soak(Path(name), given.steps, given.faults, given.seed, given.optimizer)
    json.dump(found, sys.stdout, indent=1)
