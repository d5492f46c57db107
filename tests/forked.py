"""Processes for tests, forked from one that has loaded torch and the package.

Each process would take longer to import them than most tests take, so a server (of Python's
`multiprocessing`) imports them once, computes nothing, and forks. It ends with the tests.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

#: What each process does: (rank, world, folder, *arguments) -> anything that can be saved.
Work = Callable[..., Any]

_loaded = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",  # which a first step imports
    "lowrank.optimizers",
    "pytest",
]


def load(names: Iterable[str]) -> None:
    """Has the server load further modules, if it isn't there yet."""
    _loaded.extend(name for name in names if name not in _loaded)


def context() -> ForkServerContext:
    """Makes processes; its server is there."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_loaded)
    # Inherited by all processes, whatever a test has set meanwhile.
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return made


def start(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Has `count` processes call `work(rank, *arguments)`; raises what one of them has raised."""
    import torch.multiprocessing as mp

    context()
    mp.start_processes(_call, (work, arguments), nprocs=count, start_method="forkserver")


def freeze() -> None:
    """Takes what is loaded out of the garbage collector, whose rounds would look through it."""
    gc.freeze()


def _call(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    freeze()
    work(rank, *arguments)


def run(work: Work, world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What each of `world` processes, which have a process group, returned."""
    import torch

    start(_start, (world, str(folder), work, arguments), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _start(rank: int, world: int, folder: str, work: Work, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = Path(folder) / f"store-{work.__name__}-{world}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    made = work(rank, world, Path(folder), *arguments)
    torch.save(made, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
