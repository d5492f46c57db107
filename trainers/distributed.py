"""One process or several: torchrun's environment, and sums over processes."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .watch import ADVICE, LOST, LostProcessError, Watch, connections, is_connection_failure


@dataclass(frozen=True)
class World:
    """This process and its process group.

    Attributes:
        rank: this process's number; 0 writes files and messages.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of equally shaped tensors over the processes, on the tensor's device."""
        if self.size == 1:
            return values
        moved = values.to(self.device) if self.device.type == "cuda" else values.clone()
        dist.all_reduce(moved)
        return moved.to(values.device)

    def sum_integer(self, value: int) -> int:
        """The sum of a whole number over the processes."""
        return int(self.sum(torch.tensor(value, dtype=torch.int64)).item())

    def gather(self, value: object) -> list[Any]:
        """The values of all processes, by rank, on every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: object) -> Any:
        """Rank 0's value on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `train.device` names; "auto" takes CUDA where there is any.

    Raises:
        ValueError: torch doesn't know the device, or this machine doesn't have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device is {name!r}; accepted: auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"train.device is {name!r}, but torch sees no CUDA device here")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(
                f"train.device is cuda:{index}; this machine has {count} CUDA device(s)"
            )
        device = torch.device("cuda", index)
    elif device.type not in ("cpu", "mps"):
        raise ValueError(f"train.device is {name!r}; accepted: auto, cpu, cuda or cuda:N")
    return device


#: Groups that were joined. Were the last reference that of `DistributedDataParallel`, whose end
#: keeps Python's lock, gloo's thread could wait for this lock and the process for the thread.
_GROUPS: list[dist.ProcessGroup] = []


@contextmanager
def join(
    device_name: str, environment: Mapping[str, str] = os.environ, timeout: float = 1800.0
) -> Iterator[World]:
    """Joins the processes that torchrun started; one process by itself needs nothing set.

    Args:
        device_name: `train.device`.
        environment: where RANK, WORLD_SIZE and LOCAL_RANK are looked up.
        timeout: seconds after which a process that doesn't answer counts as lost.

    Raises:
        LostProcessError: another process has ended or no longer answers.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    rank = int(environment.get("RANK", "0"))
    device = choose_device(device_name, int(environment.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # A restart by torchrun counts anew.
    prefix = f"lowrank/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit)
        watch = Watch(connections(address, port, prefix), rank, size, timeout, hosted=hosted)
    except RuntimeError as error:
        if not is_connection_failure(error):
            raise
        raise LostProcessError(
            f"rank {rank} doesn't reach the other {size - 1} process(es) through {address}:{port}"
            f" ({_first_line(error)}); all have to be started within distributed.timeout"
            f" ({timeout:g} seconds)"
        ) from error
    assert dist.group.WORLD is not None
    _GROUPS.append(dist.group.WORLD)
    try:
        with watch, _as_one(watch):
            yield World(rank, size, device)
            # Together: a process that ends earlier may close connections that others use.
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_one(watch: Watch) -> Iterator[None]:
    """Lets several processes speak with one voice while the block runs.

    A warning or an error that all of them have is shown by one; an exchange that fails because
    another process is gone becomes a `LostProcessError`. SIGTERM, which torchrun then sends, waits
    for the line about it if `catch_termination` was there to catch it.

    Raises:
        LostProcessError: another process has ended or no longer answers.
    """
    show = warnings.showwarning
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)

    def show_once(message: Warning | str, *rest: Any, **keywords: Any) -> None:
        if watch.first(str(message)):
            show(message, *rest, **keywords)

    warnings.showwarning = show_once
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if is_connection_failure(error):
            lost = LostProcessError(f"{watch.explain(_first_line(error))}; {ADVICE}")
            if not watch.first_here(LOST):
                mark_said(lost)
            raise lost from error
        watch.first_here(LOST)  # The others will miss this process, for a reason that is told.
        if not watch.first(str(error)):
            mark_said(error)
        raise
    finally:
        warnings.showwarning = show
        if in_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def mark_said(error: BaseException) -> None:
    """Notes that another process shows an error; the command line then doesn't."""
    error.said_by_another = True  # type: ignore[attr-defined]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
