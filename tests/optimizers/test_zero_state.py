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

from lowrank.optimizers import build, convert, merge
from lowrank.optimizers.engine.zero import PARTITION
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
EACH = [*(name for name, _ in ALL), *(name for name, _ in EVERY)]
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


def files(folder: Path, name: str, world: int) -> list[Path]:
    return [folder / f"{name}-{rank}-of-{world}.pt" for rank in range(world)]


def saving(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Trains some steps, and has each process save its part, and rank 0 one process's state.

    Returns:
        By method the weights of one process alone after all steps.
    """
    warnings.simplefilter("ignore")
    expected = {}
    for position, name in enumerate(names):
        model, stage = trained(name), stage_of(position, world)
        engine = engine_of(model, build(name, model, **options(name)), stage, world)
        go_on(engine, range(SAVED), rank, world)
        found = engine.optimizer.state_dict()
        content: dict[str, Any] = {
            "parts": [found[key] for key in KEYS[stage]],
            "model": {**model.state_dict(), **whole(model)},
        }
        torch.save(content, files(folder, name, world)[rank])
        # LoQT averages its gradients over all processes where parameters are plain.
        if rank == 0 or name == "loqt_adamw":
            model = trained(name)
            optimizer = build(name, model, **options(name))
            train(model, optimizer, range(SAVED))
            torch.save(
                {"optimizer": optimizer.state_dict(), "model": model.state_dict()},
                folder / f"{name}.pt",
            ) if rank == 0 else None
            train(model, optimizer, range(SAVED, STEPS))
            expected[name] = dense(name, model.state_dict())
    return expected


def going_on(
    rank: int, world: int, folder: Path, names: list[str], before: list[int]
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Weights after all steps, of engines that go on from states of other numbers of processes."""
    warnings.simplefilter("ignore")
    made = {}
    for position, name in enumerate(names):
        for former in before:
            model, stage = trained(name), stage_of(position, world)
            if former == 1:
                saved = torch.load(folder / f"{name}.pt", weights_only=True)
            else:
                parts = [
                    torch.load(path, weights_only=True, mmap=True)
                    for path in files(folder, name, former)
                ]
                saved = parts[0]
            model.load_state_dict(saved["model"])
            optimizer = build(name, model, **options(name))
            params = [param for group in optimizer.param_groups for param in group["params"]]
            named = {id(param): called for called, param in model.named_parameters()}
            stored = [saved["model"][named[id(param)]] for param in params]
            state = saved.get("optimizer")
            weight = stored.__getitem__
            if former > 1:
                states, flats = zip(*(part["parts"] for part in parts), strict=True)
                state, weight = whole_state(optimizer, states), whole_weights(states, flats)
                for number, param in enumerate(params):
                    assert torch.equal(weight(number).view(param.shape), stored[number])
            if world == 1:
                optimizer.load_state_dict({**state, "state": dict(state["state"])})
                train(model, optimizer, range(SAVED, STEPS))
                made[name, former] = dense(name, model.state_dict())
                continue
            engine = engine_of(model, optimizer, stage, world)
            inner = engine.optimizer
            if stage == 3:
                inner.checkpoint_event_prologue()
            own = part_state(optimizer, state)
            if former == 1:
                with pytest.raises(ValueError, match="load_zero_checkpoint, which divides it"):
                    optimizer.load_state_dict(
                        {**own, PARTITION: {**own[PARTITION], "rank": rank + 1}}
                    )
            now = inner.state_dict()
            current = (
                inner.fp32_partitioned_groups_flat
                if stage == 3
                else inner.single_partition_of_fp32_groups
            )
            divided = part_weights(optimizer._partitions, current, weight)
            now.update(zip(KEYS[stage], (own, divided), strict=True))
            inner.load_state_dict([now] * world, load_from_fp32_weights=True)
            if stage == 3:
                inner.checkpoint_event_epilogue()
            go_on(engine, range(SAVED, STEPS), rank, world)
            made[name, former] = dense(name, {**model.state_dict(), **whole(model)})
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
    found = run(going_on, 3, tmp_path, names, [2, 1])[0]
    alone = run(going_on, 1, tmp_path, names, [2])[0]
    gaps = {
        (name, world, former): distance(weights, expected[name])
        for world, made in ((3, found), (1, alone))
        for (name, former), weights in made.items()
    }
    assert len(gaps) == 3 * len(names)
    assert {key: gap for key, gap in gaps.items() if not gap <= limit(key[0])} == {}
