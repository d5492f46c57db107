"""What the processes of a run must have in common, checked before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import RunConfig
from .data import Tokenizer, check_division, data_fingerprint
from .distributed import World
from .parts import saved_partitions
from .strategies import strategy_of
from .zero_checkpoint import says_its_parts

#: Settings that are each process's own matter.
_OWN = ("train.device", "distributed.timeout")


def check_same_request(settings: Mapping[str, Any], resume: str | None, world: World) -> None:
    """Refuses processes that were started with other settings than rank 0, whose count for all.

    Paths are not compared: working folders and mounts may differ.

    Args:
        settings: what this process was given explicitly, by section.
        resume: of `--resume`.
        world: the process group; every process must call this.

    Raises:
        ValueError: one line that names the setting and the rank.
    """
    if world.size == 1:
        return
    how = resume if resume in (None, "auto") else "FOLDER"
    first, *others = world.gather({**dict(_flat(settings)), "--resume": how})
    for rank, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            own, leading = other.get(key), first.get(key)
            if own == leading or key in _OWN or (_is_path(own) and _is_path(leading)):
                continue
            raise ValueError(
                f"{key} is {_given(own)} on rank {rank} and {_given(leading)} on rank 0; start all"
                " processes with the same settings"
            )


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.sep in value


def _given(value: object) -> str:
    return "not given" if value is None else repr(value)


def check_processes(config: RunConfig, size: int) -> None:
    """Refuses a strategy that can't be had, and processes that can't share a step evenly.

    Args:
        config: the run's settings.
        size: number of processes.

    Raises:
        ValueError: one line that names the setting or the numbers.
    """
    strategy_of(config, size)
    shards = config.distributed.data_shards or size
    check_division(config.train.batch_size, config.train.accumulation, shards, size)


def check_partitions(checkpoint: Path, config: RunConfig, size: int) -> None:
    """Refuses to divide a checkpoint of DeepSpeed anew that doesn't say how it is divided.

    Args:
        checkpoint: where to go on from.
        config: the run's settings.
        size: number of processes.

    Raises:
        ValueError: one line that names both numbers of processes.
    """
    processes, before = saved_partitions(checkpoint)
    strategy = strategy_of(config, size)
    now = config.distributed.zero_stage if strategy == "deepspeed" else 0
    if not before or (before, processes) == (now, size) or says_its_parts(checkpoint, processes):
        return
    raise ValueError(
        f"{checkpoint} was written by {_shared_by(processes, before)}, in an earlier version that"
        f" doesn't say how it is divided, and the run goes on with {_shared_by(size, now)};"
        f" accepted: {processes} processes with {_settings(before)}, or a new run with another"
        f" --output from these weights with --set model.initial={checkpoint}"
    )


def _shared_by(processes: int, stage: int) -> str:
    """How many processes, and the settings that divide a run among them."""
    several = f"{processes} process" + ("es" if processes != 1 else "")
    return f"{several} with {_settings(stage)}" if stage else f"{several} without DeepSpeed"


def _settings(stage: int) -> str:
    return f"distributed.strategy=deepspeed and distributed.zero_stage={stage}"


def check_shared(checkpoint: Path, world: World) -> None:
    """Refuses a checkpoint that isn't there for all processes, before it looks damaged to some.

    Raises:
        ValueError: a process doesn't see it; every process must call this.
    """
    for rank, seen in enumerate(world.gather(checkpoint.is_dir())):
        if not seen:
            raise ValueError(
                f"rank {rank} doesn't see {checkpoint}; --output must be on a file system that all"
                " machines share"
            )


def check_same_data(config: RunConfig, tokenizer: Tokenizer, world: World) -> None:
    """Refuses processes that would train on different data without a word.

    Raises:
        ValueError: data or tokenizer differ; every process must call this.
    """
    if world.size == 1:
        return
    own = {"data": data_fingerprint(config.data), "tokenizer": tokenizer.fingerprint}
    first, *others = world.gather(own)
    for rank, other in enumerate(others, start=1):
        for what in own:
            if other[what] != first[what]:
                raise ValueError(
                    f"rank {rank} and rank 0 have different {what} for data.source"
                    f" {config.data.source!r}; every machine needs the same"
                )
