"""Runs of the real command on several processes, all started from one that has torch loaded.

Importing torch and transformers takes longer than a tiny run, so that processes are forked (see
`forked`) as torchrun would start them.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import forked

#: What the server of processes loads, for modules of tests that run jobs.
PRELOAD = ("transformers.models.llama.modeling_llama", "lowrank.trainers.pretrain")

#: In place of a signal: a full disk, for the parts of the optimizer's state or for the weights.
FULL_SHARDS, FULL_WEIGHTS, FULL_PARTITION = 0, -1, -2

#: Seconds after which a job's processes are killed.
JOB_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """One run of the command.

    Attributes:
        arguments: of `lowrank`.
        processes: how many share the run; 1 starts it without torchrun's environment.
        stop: {rank: (step, signal)} sent to itself at the start of the step after `step`, or, with
            a negative step, while the checkpoint of step -step is written; FULL_SHARDS,
            FULL_WEIGHTS and FULL_PARTITION (ZeRO's) stand for a full disk there.
        folders: the processes' working folders.
        copied: (from, to): a run's folder that is copied before.
        faults: {rank: (step, name, number, kind)}: which call of that name fails, and how, while
            that step's checkpoint is written; see `faults.Disk`.
    """

    arguments: Sequence[str]
    processes: int = 1
    stop: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: Sequence[str] = ()
    copied: tuple[str, str] | None = None
    faults: dict[str, tuple[int, str, int, int | str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a job's processes, by rank.

    Attributes:
        statuses: exit statuses, negative for signals.
        outputs: standard outputs.
        errors: standard errors.
        seconds: from the first process's end to that of the last one that isn't stopped.
    """

    statuses: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float


def run_jobs(jobs: Sequence[Job], folder: Path, timeout: float = 300) -> list[Outcome]:
    """Runs jobs one after another; `folder` takes their outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    context = forked.context()
    zero = any("deepspeed" in argument for job in jobs for argument in job.arguments)
    limit = time.monotonic() + timeout
    outcomes = []
    for number, job in enumerate(jobs):
        assert time.monotonic() < limit, f"{number} of {len(jobs)} jobs took {timeout} seconds"
        outcomes.append(_run(context, job, folder / f"job-{number}", zero))
    return outcomes


def succeed(jobs: Sequence[Job], folder: Path) -> list[Outcome]:
    """Runs jobs that must all end well."""
    outcomes = run_jobs(jobs, folder)
    for outcome in outcomes:
        assert not any(outcome.statuses), "\n".join(outcome.errors)
    return outcomes


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _prepare_deepspeed() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from lowrank.trainers import zero_engine

    # Its reductions in shared memory wait actively, which processes on few cores can't afford.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plain = zero_engine.engine_config

    def small(*arguments: Any) -> dict[str, Any]:
        """With parameters that stage 3 keeps whole, and larger ones that it doesn't."""
        found = plain(*arguments)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 2000
        return found

    replace(zero_engine, "engine_config", small)


#: Steps done before the one whose loss counts as a spike, and before that without a gradient.
SPIKE, NOT_FINITE = 2, 4


def _disturb() -> None:
    """Has two steps of every run be skipped."""
    from lowrank.trainers import loop

    take, judge = loop.Loop._step, loop.reason_to_skip

    def step(self: Any) -> None:
        done, module = self._parts.state.step, self._parts.model
        if done == SPIKE:
            loop.reason_to_skip = lambda gradient, *rest: ("spike", gradient.loss)
        handle = module.register_forward_hook(_not_finite) if done == NOT_FINITE else None
        try:
            take(self)
        finally:
            loop.reason_to_skip = judge
            if handle is not None:
                handle.remove()

    replace(loop.Loop, "_step", step)


def _not_finite(module: Any, inputs: Any, loss: Any) -> Any:
    """A hook that leaves a loss as it is, and of its gradient nothing finite on the last rank."""
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if loss.requires_grad and last:
        loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


def _run(context: ForkServerContext, job: Job, folder: Path, zero: bool) -> Outcome:
    folder.mkdir()
    if job.copied:
        shutil.copytree(*job.copied)
    port = free_port()
    children = [
        context.Process(target=_become, args=(job, rank, port, folder, zero))
        for rank in range(job.processes)
    ]
    for child in children:
        child.start()
    statuses: dict[int, int] = {}
    first = ended = 0.0
    stopped = [int(rank) for rank, (_, number) in job.stop.items() if number == signal.SIGSTOP]
    limit = time.monotonic() + JOB_SECONDS
    while len(statuses) < len(children):
        wait([child.sentinel for rank, child in enumerate(children) if rank not in statuses], 1)
        for rank, child in enumerate(children):
            if rank in statuses or child.exitcode is None:
                continue
            first = first or time.monotonic()
            statuses[rank] = child.exitcode
            if len(statuses) == len(children) - len(stopped):
                ended = time.monotonic()
                for other in stopped:
                    children[other].kill()
        if time.monotonic() > limit:
            for rank, child in enumerate(children):
                if rank not in statuses:
                    child.kill()
    return Outcome(
        [statuses[rank] for rank in range(job.processes)],
        [(folder / f"out-{rank}").read_text() for rank in range(job.processes)],
        [(folder / f"err-{rank}").read_text() for rank in range(job.processes)],
        ended - first,
    )


def _become(job: Job, rank: int, port: int, folder: Path, zero: bool) -> None:
    """Turns a forked child into one process of the run."""
    from lowrank.trainers.cli import main

    status = 70
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY)
            os.dup2(file, descriptor)
        if job.processes > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(job.processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        if job.folders:
            os.chdir(job.folders[rank])
        import torch

        torch.set_num_threads(1)
        if zero:
            _prepare_deepspeed()
            _disturb()
        _skip_report()
        forked.freeze()
        # A shell ignores interrupts for what it runs in the background, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if str(rank) in job.stop:
            stop_itself(*job.stop[str(rank)])
        if str(rank) in job.faults:
            fail_in_writing(*job.faults[str(rank)])
        status = main(job.arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def replace(owner: Any, name: str, value: Any) -> None:
    """Puts `value` in the place of what the program calls.

    Raises:
        AttributeError: nothing stands there, so that the program would go on without it.
    """
    getattr(owner, name)
    setattr(owner, name, value)


def fail_in_writing(step: int, name: str, number: int, kind: int | str) -> None:
    """Has a call of this process fail, see `Job.faults`."""
    from faults import Disk

    from lowrank.trainers import loop

    save = loop.Loop._save

    def failing(self: Any) -> Path:
        if self._parts.state.step != step:
            return save(self)
        # Of rank 0 too: the others don't know the folder.
        with Disk(Path("/"), number, kind, name=name, below="checkpoints").watched():
            return save(self)

    replace(loop.Loop, "_save", failing)


def _skip_report() -> None:
    from lowrank.trainers import pretrain

    replace(pretrain, "write_report", lambda folder: folder / "report.html")


def stop_itself(step: int, number: int) -> None:
    """Has this process send itself a signal, see `Job.stop`."""
    from lowrank.trainers import loop, parts, sharded_checkpoint, stored

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step < 0 and number == FULL_PARTITION:
        save = parts.torch.save

        def save_no_file(*arguments: Any, **keywords: Any) -> None:
            # Exchanges between processes pickle with keywords.
            (save if keywords else full)(*arguments, **keywords)

        replace(parts.torch, "save", save_no_file)
        return
    if step < 0 and number == FULL_WEIGHTS:
        replace(stored, "_header", full)
        return
    if step < 0:
        write = parts.write_shards

        def dying_in_write(*arguments: Any) -> None:
            if number == FULL_SHARDS:
                replace(sharded_checkpoint.FileSystemWriter, "write_data", full)
            elif arguments[1].name.endswith(f"{-step:08d}"):
                os.kill(os.getpid(), signal.Signals(number))
            write(*arguments)

        replace(parts, "write_shards", dying_in_write)
        return
    take = loop.Loop._step

    def dying(self: Any) -> None:
        if self._parts.state.step == step:
            os.kill(os.getpid(), signal.Signals(number))
        take(self)

    replace(loop.Loop, "_step", dying)
