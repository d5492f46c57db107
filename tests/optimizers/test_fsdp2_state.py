"""State under FSDP2: where it lies, its bytes, and checkpoints for other numbers of ranks."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsdp2_runs import NAMES, limit, options_of
from sharded import block, distance, run, shard, train, whole
from support import hashed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lowrank.optimizers import LowRankOptimizer, build, expected_state_bytes, state_bytes

SAVED = ("galore_adamw", "galore_adamw_8bit", "adafactor", "fira_adamw", "online_subspace_adamw")


def placed(optimizer: LowRankOptimizer) -> dict[str, str]:
    """Placement of each kind of entry of the first projected groups' states."""
    found: dict[str, str] = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state[param].items():
                if isinstance(value, DTensor):
                    found[f"{name} {key}"] = str(value.placements[-1])
                else:
                    found[f"{name} {key}"] = type(value).__name__
    return found


def states(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    mesh = DeviceMesh("cpu", torch.arange(world))
    made: dict[str, Any] = {}
    for name in names:
        optimizer = build(name, shard(block(), mesh), **options_of((name, {})))
        made[name] = state_bytes(optimizer)
        if name == "galore_adamw_8bit":
            made["placed"] = placed(optimizer)
    return made


@pytest.mark.slow
def test_moments_are_spread_and_bytes_are_the_formulas(tmp_path: Path) -> None:
    made = run(states, 3, tmp_path, NAMES)
    for name in NAMES:
        options = options_of((name, {}))
        options.pop("lr")
        expected = expected_state_bytes(name, block(), world=3, **options)
        assert made[0][name] == expected, name
        assert all(other[name] <= expected for other in made), name
    where = made[0]["placed"]
    assert where["mlp.up.weight exp_avg"] == "S(0)"  # right: rows
    assert where["mlp.down.weight exp_avg"] == "S(1)"  # left: columns
    assert where["mlp.up.weight exp_avg_absmax"] == "S(0)"
    assert where["mlp.up.weight basis"] == where["mlp.up.weight step"] == "Tensor"
    assert where["mlp.up.weight refreshed_at"] == "int"


class Scaled(nn.Module):
    """One tall matrix and one wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(64, 256, bias=False, device="meta")
        self.mlp = nn.Linear(256, 64, bias=False, device="meta")


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "adamw", "fira_adamw"])
def test_bytes_fall_as_the_number_of_ranks_but_for_bases(name: str) -> None:
    def spread(world: int) -> int:
        whole = expected_state_bytes(name, Scaled(), rank=16, world=world)
        bases = 2 * 64 * 16 * 4 if name != "adamw" else 0
        counts = 2 * (8 if name == "fira_adamw" else 4)
        return whole - bases - counts

    for world in (2, 4, 8):
        assert spread(1) == world * spread(world)


def checkpoints(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, float]:
    """Distances from an uninterrupted run after going on with other numbers of ranks."""
    warnings.simplefilter("ignore")
    meshes = {size: DeviceMesh("cpu", torch.arange(size)) for size in (1, 2, 4)}
    far: dict[str, float] = {}

    def new(name: str, size: int) -> tuple[nn.Module, LowRankOptimizer]:
        model = block(seed=1) if size == 0 else shard(block(seed=1), meshes[size])
        return model, build(name, model, **options_of((name, {})))

    def pieces(model: nn.Module, optimizer: LowRankOptimizer) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }

    for name in names:
        alone: dict[str, Tensor] = {}
        if rank == 0:
            model, optimizer = new(name, 0)
            train(model, optimizer, range(10))
            alone = whole(model)
        for before, after in ((4, 2), (2, 1), (1, 4), (4, 0), (0, 2)):
            at = str(folder / f"{name}-{before}-{after}")
            if rank < max(before, 1):
                model, optimizer = new(name, before)
                train(model, optimizer, range(5), rank, max(before, 1))
                group = meshes[max(before, 1)].get_group()
                dcp.save(pieces(model, optimizer), checkpoint_id=at, process_group=group)
            torch.distributed.barrier()
            if rank < max(after, 1):
                model, optimizer = new(name, after)
                held = pieces(model, optimizer)
                group = meshes[max(after, 1)].get_group()
                dcp.load(held, checkpoint_id=at, process_group=group)
                set_model_state_dict(model, held["model"])
                set_optimizer_state_dict(model, optimizer, held["optimizer"])
                train(model, optimizer, range(5, 10), rank, max(after, 1))
                made = whole(model)
                if rank == 0:
                    far[f"{name} from {before} to {after}"] = distance(made, alone)
    return far


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SAVED[1:3], marks=pytest.mark.slow, id="some"),
        pytest.param(SAVED, marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_checkpoints_go_on_with_other_numbers_of_ranks(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """0 stands for a model that is not sharded."""
    far = run(checkpoints, 4, tmp_path, list(names))[0]
    assert len(far) == 5 * len(names)
    assert not {called: gap for called, gap in far.items() if not gap <= limit(called)}


def hybrid(rank: int, world: int, folder: Path) -> float:
    """HSDP: replicas of shards."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(block(), mesh)
    train(
        model, build("galore_adamw", model, **options_of(("galore_adamw", {}))), range(9), rank, 4
    )
    made = whole(model)
    model = block()
    train(model, build("galore_adamw", model, **options_of(("galore_adamw", {}))), range(9))
    return distance(made, whole(model))


def failing(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A number that is not finite, on one rank alone."""
    mesh = DeviceMesh("cpu", torch.arange(world))
    model = shard(block(), mesh)
    optimizer = build("galore_adamw", model, **options_of(("galore_adamw", {})))
    train(model, optimizer, range(2), rank, world)
    before = whole(model)
    warnings.simplefilter("ignore")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    names = dict(model.named_parameters())
    for name in ("mlp.up.weight", "mlp.down.weight", "embed.weight"):
        if rank == world - 1:
            names[name].grad.to_local().fill_(math.nan)
    optimizer.step()
    after = whole(model)
    same = [name for name in before if torch.equal(before[name], after[name])]
    steps = [float(state["step"]) for state in optimizer.state.values()]
    return {"same": same, "skipped": optimizer.skipped_by_name(), "steps": steps}


#: Rules by entry, and a projection that only picks entries: nothing is summed that would round.
#: torch's fused kernel rounds the last entries of a tensor otherwise than the others.
EXACT = (
    ("adamw", {"fused": False}),
    ("galore_adamw", {"projector": "coordinate", "proj_type": "left", "fused": False}),
    ("galore_adamw", {"projector": "coordinate", "proj_type": "right", "fused": False}),
)


def to_the_bit(rank: int, world: int, folder: Path) -> list[bool]:
    """Whether integers as gradients give the weights of one process, exactly."""
    warnings.simplefilter("ignore")
    mesh, equal = DeviceMesh("cpu", torch.arange(world)), []
    for name, options in EXACT:
        keywords = {**options_of((name, options)), "update_proj_gap": 3}
        models = [block(), shard(block(), mesh)]
        optimizers = [build(name, model, **keywords) for model in models]
        for step in range(8):
            for model, spread in zip(models, (False, True), strict=True):
                for index, param in enumerate(model.parameters()):
                    values = 9 * hashed(param.numel(), 50 * step + index)
                    grad = values.round().view(param.shape).to(param.dtype)
                    if spread:
                        grad = distribute_tensor(grad, mesh, param.placements)
                    param.grad = grad
            for optimizer in optimizers:
                optimizer.step()
        alone, together = (whole(model) for model in models)
        equal.append(all(torch.equal(alone[key], together[key]) for key in alone))
    return equal


def faults_and_bits(rank: int, world: int, folder: Path) -> tuple[dict[str, Any], list[bool]]:
    return failing(rank, world, folder), to_the_bit(rank, world, folder)


@pytest.mark.slow
def test_hybrid_shards_follow_one_process(tmp_path: Path) -> None:
    assert max(run(hybrid, 4, tmp_path)) <= 1e-5


@pytest.mark.slow
def test_ranks_agree_on_what_is_not_finite_and_integers_give_the_same_bits(tmp_path: Path) -> None:
    together = run(faults_and_bits, 2, tmp_path)
    assert [bits for _, bits in together] == [[True] * len(EXACT)] * 2
    made = [faults for faults, _ in together]
    assert made[0] == made[1]
    wanted = {"mlp.up.weight", "mlp.down.weight", "embed.weight"}
    assert set(made[0]["same"]) == set(made[0]["skipped"]) == wanted
    assert sorted(set(made[0]["steps"])) == [2.0, 3.0]
