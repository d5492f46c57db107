"""One case after another in processes that stay: FSDP2 on some ranks, and one process alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from sharded import block, distance, shard, train, whole
from table import TABLE
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lowrank.optimizers import build

#: A method's name, and options.
Case = tuple[str, dict[str, Any]]

OPTIONS = {row.name: row.options for row in TABLE}
#: Methods that replace layers have tests of their own.
NAMES = [row.name for row in TABLE if not row.factored]
ALL: list[Case] = [(name, {}) for name in NAMES]
QUICK: list[Case] = [
    ("adamw", {}),
    ("adamw_8bit", {}),
    ("adafactor", {}),
    ("muon", {}),
    ("galore_adamw", {}),
    ("galore_adamw", {"proj_type": "full", "refresh": "warm"}),
    ("galore_adamw_8bit", {}),
    ("fira_adamw", {}),
    ("online_subspace_adamw", {}),
    ("coap_adamw", {"reproject_factor": 2}),
    ("apollo_adamw", {}),
    ("frugal_adamw", {}),
    ("flora_adafactor", {}),
    ("lisa_adamw", {}),
    ("gradnorm_lorp_adamw", {}),
    ("galore_adamw", {"plain_rule": "adafactor", "plain_lr": 3e-3}),
    ("coap_adafactor_8bit", {"plain_rule": "adamw_8bit", "min_8bit_size": 64}),
]


def options_of(case: Case) -> dict[str, Any]:
    name, options = case
    made = {"lr": 1e-2, "rank": 4, "update_proj_gap": 7, **OPTIONS[name], **options}
    if name in ("apollo_mini_adamw", "lora_pre_adamw"):
        made["lr"] = 1e-3  # higher rates magnify rounding errors (APOLLO-Mini's are times 128^0.5)
    if name == "qgalore_adamw_8bit":
        made["weight_bits"] = None
    return made


#: On each number of ranks; the others on one of them.
CORE = ("adamw", "adafactor", "galore_adamw", "galore_adamw_8bit", "fira_adamw")


def sizes_of(case: Case, position: int, sizes: list[int]) -> list[int]:
    return sizes if case[0] in CORE else [sizes[position % len(sizes)]]


def follow(
    rank: int,
    world: int,
    folder: Path,
    cases: list[Case],
    sizes: list[int],
    steps: int,
    columns: bool = False,
) -> list[dict[int, dict[str, Tensor]]]:
    """Weights of each case for each number of ranks; the last process trains alone as well."""
    warnings.simplefilter("ignore")
    meshes = {size: DeviceMesh("cpu", torch.arange(size)) for size in sizes}
    made: list[dict[int, dict[str, Tensor]]] = []
    for position, case in enumerate(cases):
        found: dict[int, dict[str, Tensor]] = {}
        for size in sizes_of(case, position, sizes):
            if rank < size:
                model = shard(block(), meshes[size], columns=columns)
                train(model, build(case[0], model, **options_of(case)), range(steps), rank, size)
                found[size] = whole(model)
        if rank == world - 1:
            model = block()
            train(model, build(case[0], model, **options_of(case)), range(steps))
            found[1] = whole(model)
        made.append(found)
    return made


def check(made: list[Any], cases: list[Case], sizes: list[int]) -> dict[str, float]:
    distances = {}
    for position, case in enumerate(cases):
        alone = made[-1][position][1]
        for size in sizes_of(case, position, sizes):
            gap = distance(made[0][position][size], alone)
            distances[f"{case[0]} {case[1]} on {size}"] = gap
    return distances


def limit(called: str) -> float:
    # Codes of 8 bits round differences of the last bit to whole steps.
    return 5e-2 if "8bit" in called else 1e-5
