"""States under DeepSpeed's ZeRO go on with other numbers of processes and stages, and alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_runs import ALL
from grid import options
from sharded import block, distance, run, train
from sharded import whole as plain
from test_fsdp2_layers import EVERY
from test_zero import engine_of, go_on, whole
from torch import Tensor, nn

from lowrank.optimizers import build, convert, load_zero_checkpoint, merge
from lowrank.optimizers.engine.zero_state import (
    part_state,
    part_weights,
    whole_state,
    whole_weights,
)

pytest.importorskip("deepspeed")
PRELOAD = ("deepspeed",)
pytestmark = pytest.mark.slow

SAVED, STEPS = 6, 10
#: One of each form of state: rows and columns, codes and scales, factors, layers that take turns.
SOME = ["galore_adamw_8bit", "galore_adafactor", "lisa_adamw", "switchlora_adamw"]
EACH = list(dict.fromkeys(name for name, _ in (*ALL, *EVERY)))
KEYS = {
    1: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    3: ("optimizer_state_dict", "fp32_flat_groups"),
}
KEYS[2] = KEYS[1]


def stage_of(position: int, world: int) -> int:
    """Another one for another number of processes."""
    return 1 + (position + world) % 3


def trained(name: str) -> nn.Module:
    return convert(name, block(), **options(name))


def dense(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    model = trained(name)
    model.load_state_dict(state)
    return plain(merge(model))


def parts_of(folder: Path, name: str, world: int) -> list[Path]:
    return [folder / f"{name}-{rank}-of-{world}.pt" for rank in range(world)]


def saving(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Trains some steps, and saves: the engine, each process its part, and one process alone.

    Returns:
        By method the weights of one process alone after all steps.
    """
    warnings.simplefilter("ignore")
    expected = {}
    for position, name in enumerate(names):
        model, stage = trained(name), stage_of(position, world)
        engine = engine_of(model, build(name, model, **options(name)), stage, world)
        go_on(engine, range(SAVED), rank, world)
        engine.save_checkpoint(str(folder / "engine"), name, client_state={"mine": position})
        found = engine.optimizer.state_dict()
        content: dict[str, Any] = {
            "parts": [found[key] for key in KEYS[stage]],
            "model": {**model.state_dict(), **whole(model)},
        }
        torch.save(content, parts_of(folder, name, world)[rank])
        # LoQT averages its gradients over all processes where parameters are plain.
        if rank == 0 or name == "loqt_adamw":
            model = trained(name)
            optimizer = build(name, model, **options(name))
            train(model, optimizer, range(SAVED))
            own = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
            if rank == 0:
                torch.save(own, folder / f"{name}.pt")
            train(model, optimizer, range(SAVED, STEPS))
            expected[name] = dense(name, model.state_dict())
    return expected


def from_parts(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """One process without an engine goes on from two that had one."""
    warnings.simplefilter("ignore")
    made = {}
    for name in names:
        saved = [
            torch.load(path, weights_only=True, mmap=True) for path in parts_of(folder, name, 2)
        ]
        model = trained(name)
        model.load_state_dict(saved[0]["model"])
        optimizer = build(name, model, **options(name))
        states, flats = zip(*(part["parts"] for part in saved), strict=True)
        weight = whole_weights(states, flats)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for number, param in enumerate(params):
            assert torch.equal(weight(number).view(param.shape), param)
        with pytest.raises(ValueError, match="rank 1 of 2 that DeepSpeed's ZeRO had divided it"):
            optimizer.load_state_dict(states[1])
        with pytest.raises(ValueError, match="in the place of rank 0 of 2 is that of rank 1 of 2"):
            whole_state(optimizer, states[::-1])
        found = whole_state(optimizer, states)
        optimizer.load_state_dict({**found, "state": dict(found["state"])})
        train(model, optimizer, range(SAVED, STEPS))
        made[name, "alone"] = dense(name, model.state_dict())
    return made


def from_others(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Engines go on from one of fewer processes, at another stage, and from one process alone."""
    warnings.simplefilter("ignore")
    made = {}
    for position, name in enumerate(names):
        stage = stage_of(position, world)
        model = trained(name)
        engine = engine_of(model, build(name, model, **options(name)), stage, world)
        client = load_zero_checkpoint(engine, folder / "engine", name)
        assert (client["mine"], engine.global_steps) == (position, SAVED)
        go_on(engine, range(SAVED, STEPS), rank, world)
        made[name, "engine"] = dense(name, {**model.state_dict(), **whole(model)})

        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        model = trained(name)
        model.load_state_dict(saved["model"])
        optimizer = build(name, model, **options(name))
        named = {id(param): called for called, param in model.named_parameters()}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        engine = engine_of(model, optimizer, stage, world)
        inner = engine.optimizer
        if stage == 3:
            inner.checkpoint_event_prologue()
        own = part_state(optimizer, saved["optimizer"])
        now = inner.state_dict()
        flats = part_weights(
            optimizer._partitions,
            getattr(inner, "fp32_partitioned_groups_flat" if stage == 3 else KEYS[stage][1]),
            lambda number, stored=saved["model"], params=params, named=named: stored[
                named[id(params[number])]
            ],
        )
        now.update(zip(KEYS[stage], (own, flats), strict=True))
        inner.load_state_dict([now] * world, load_from_fp32_weights=True)
        if stage == 3:
            inner.checkpoint_event_epilogue()
        go_on(engine, range(SAVED, STEPS), rank, world)
        made[name, "one"] = dense(name, {**model.state_dict(), **whole(model)})
    return made


def limit(name: str) -> float:
    if "8bit" in name:
        return 5e-2  # a code is a step of up to 1 / 16 of its value
    return 1e-4 if name == "dlrt_adamw" else 1e-5


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME, id="some"),
        pytest.param(EACH, id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_other_numbers_of_processes_go_on(names: list[str], tmp_path: Path) -> None:
    expected = run(saving, 2, tmp_path, names)[0]
    made = run(from_others, 3, tmp_path, names)[0] | run(from_parts, 1, tmp_path, names)[0]
    gaps = {key: distance(weights, expected[key[0]]) for key, weights in made.items()}
    assert len(gaps) == 3 * len(names)
    assert {key: gap for key, gap in gaps.items() if not gap <= limit(key[0])} == {}
