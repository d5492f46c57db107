"""Experts spread over processes: each trains whole ones, to the bit as one process, in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from experts import ROWS, Moe, gradient, stacked
from sharded import Recorder, run, whole
from table import identifier
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowrank.optimizers import build
from lowrank.optimizers.engine.batching import refresh_batches, update_batches
from lowrank.optimizers.engine.geometry import Geometry, RowRange
from lowrank.optimizers.engine.processes import ALONE, Processes
from lowrank.optimizers.projectors import ProjectedParam

#: What each of two processes found, by work.
Made = dict[str, list[Any]]

BY_NAME = {identifier(row): row for row in ROWS}
QUICK = ("galore_adamw", "apollo_adamw", "fira_adamw", "coap_adamw_8bit", "flora_adafactor")


class Experts(nn.Module):
    """Experts alone, whose gradients need no reduction."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        model = Moe(experts)
        self.mlp = nn.Module()
        self.mlp.up = nn.Parameter(model.mlp.up.detach().clone())
        self.mlp.down = nn.Parameter(model.mlp.down.detach().clone())


def spread(model: nn.Module, world: int) -> nn.Module:
    return fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(world)))


def set_gradients(model: nn.Module, step: int, broken: int | None = None) -> None:
    """The same whole gradients on any number of processes."""
    for index, param in enumerate(model.parameters()):
        grad = gradient(param.shape, index, step).float()
        if step == broken and param.dim() == 3:
            grad[-1, 2, 3] = torch.nan
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        else:
            param.grad = grad


def quiet() -> None:
    warnings.simplefilter("ignore")


def follow(rank: int, world: int, folder: Path, names: list[str], experts: int) -> list[Any]:
    """Weights of both, the collectives of the steps, and the placements of the state."""
    quiet()
    made = []
    for name in names:
        both = []
        recorder = Recorder()
        for model in (Experts(experts), spread(Experts(experts), world)):
            if experts > 1:
                optimizer = stacked(BY_NAME[name], model)
            else:
                named = {"params": list(model.named_parameters())}
                optimizer = BY_NAME[name].optimizer([{**named, "rank": 4, "update_proj_gap": 3}])
            for step in range(8):
                set_gradients(model, step, broken=4)
                with recorder.recording():
                    optimizer.step()
            both.append(whole(model))
        placed = {
            key: (tuple(value.shape), str(value.placements))
            for key, value in optimizer.state[model.mlp.up].items()
            if isinstance(value, DTensor)
        }
        plain = {
            key for key, value in optimizer.state[model.mlp.up].items() if type(value) is Tensor
        }
        made.append((both, recorder.calls, placed, plain))
    return made


def check(made: list[Any], names: list[str], experts: int) -> None:
    for name, ((alone, together), calls, placed, plain) in zip(names, made, strict=True):
        for key, value in alone.items():
            assert torch.equal(value, together[key]), (name, key)
        assert calls == [], name
        assert plain == set(), name
        assert all(shape[0] == experts for shape, _ in placed.values())
        assert {placement for _, placement in placed.values()} == {"(Shard(dim=0),)"}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_every_method_follows_one_process_to_the_bit(world: int, tmp_path: Path) -> None:
    for made in run(follow, world, tmp_path, list(BY_NAME), 5):
        check(made, list(BY_NAME), 5)


def beside(rank: int, world: int, folder: Path) -> list[Any]:
    """Matrices that are spread by rows, beside experts whose step counts differ."""
    quiet()
    made = []
    for model in (Moe(), spread(Moe(), world)):
        optimizer = build("galore_adamw", model, lr=1e-2, rank=4, update_proj_gap=3, foreach=True)
        for step in range(8):
            set_gradients(model, step, broken=2)
            optimizer.step()
        made.append(whole(model))
    return made


@pytest.mark.slow
def test_experts_beside_spread_matrices(made: Made) -> None:
    for alone, together in made["beside"]:
        for key, value in alone.items():
            assert (value - together[key]).norm() <= 1e-5 * value.norm(), key


def muon(rank: int, world: int, folder: Path) -> list[Any]:
    quiet()
    made = []
    for model in (Moe(), spread(Moe(), world)):
        optimizer = build("muon", model, lr=1e-2, foreach=True)
        for step in range(5):
            set_gradients(model, step, broken=2)
            optimizer.step()
        made.append(whole(model))
    return made


@pytest.mark.slow
def test_muon_on_spread_experts(made: Made) -> None:
    for alone, together in made["muon"]:
        for key, value in alone.items():
            assert (value - together[key]).norm() <= 1e-5 * value.norm(), key


def resume(rank: int, world: int, folder: Path) -> list[Any]:
    """A checkpoint of two processes, loaded by two and (its whole tensors) by one."""
    quiet()
    row = BY_NAME["galore_adamw"]
    model = spread(Experts(3), world)
    optimizer = stacked(row, model)
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    full = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    weights = whole(model)
    found = []
    for again in (spread(Experts(3), world), Experts(3)):
        for name, param in again.named_parameters():
            value = weights[name]
            if isinstance(param, DTensor):
                value = distribute_tensor(value, param.device_mesh, param.placements)
            param.data.copy_(value)
        resumed = stacked(row, again)
        if isinstance(again.mlp.up, DTensor):
            set_optimizer_state_dict(again, resumed, saved)
        elif rank == 0:
            set_optimizer_state_dict(again, resumed, full)
        else:
            continue
        for step in range(4, 8):
            set_gradients(again, step)
            resumed.step()
        found.append(whole(again))
    for step in range(4, 8):
        set_gradients(model, step)
        optimizer.step()
    return [whole(model), *found]


@pytest.mark.slow
def test_a_checkpoint_is_resumed_exactly(made: Made) -> None:
    first, second = made["resume"]
    assert len(first) == 3
    for wanted, *found in (first, second):
        for own in found:
            for key, value in wanted.items():
                assert torch.equal(value, own[key]), key


def changed(rank: int, world: int, folder: Path) -> list[Any]:
    quiet()
    made = []
    for model in (Experts(3), spread(Experts(3), world)):
        optimizer = stacked(BY_NAME["galore_adamw"], model)
        for step in range(8):
            set_gradients(model, step)
            if step == 5:
                optimizer.param_groups[0].update(rank=6, moments="rotate")
            optimizer.step()
        made.append(whole(model))
    return made


@pytest.mark.slow
def test_changed_options_are_followed(made: Made) -> None:
    for alone, together in made["changed"]:
        for key, value in alone.items():
            assert torch.equal(value, together[key]), key


def shared(rank: int, world: int, folder: Path) -> list[Any]:
    """Copies (DDP), whose refreshes of single experts are shared."""
    quiet()
    recorder, found = Recorder(), []
    for share in (True, False):
        model = Moe()
        optimizer = stacked(BY_NAME["galore_adamw"], model)
        if share:
            optimizer.share_refreshes()
        for step in range(8):
            set_gradients(model, step)
            with recorder.recording():
                optimizer.step()
        found.append(whole(model))
    sent = sum(call[0] == "broadcast" for call in recorder.calls)
    return [found[0], sent, found[1]]


@pytest.mark.slow
def test_refreshes_of_experts_are_shared(made: Made) -> None:
    (first, sent, alone), (second, _, _) = made["shared"]
    assert sent > 0
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        assert torch.equal(first[key], value)


def refused(rank: int, world: int, folder: Path) -> str:
    model = spread(Moe(), world)
    optimizer = stacked(BY_NAME["galore_adamw"], model)
    optimizer.share_refreshes(dist.group.WORLD)
    set_gradients(model, 0)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_refreshes_of_spread_parameters_are_not_shared(made: Made) -> None:
    for said in made["refused"]:
        assert "share_refreshes() with attn.q.weight spread over processes" in said


def other_axis(rank: int, world: int, folder: Path) -> str:
    mesh = DeviceMesh("cpu", torch.arange(world))
    param = nn.Parameter(distribute_tensor(torch.zeros(4, 12, 12), mesh, [Shard(1)]))
    try:
        stacked_groups = [{"params": [("mlp.up", param)], "rank": 4}]
        BY_NAME["galore_adamw"].optimizer(stacked_groups)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_rows_of_experts_are_not_spread(made: Made) -> None:
    for said in made["other_axis"]:
        assert "mlp.up is a DTensor with placements (S(1))" in said


# All of it on the same two processes


def methods(rank: int, world: int, folder: Path) -> list[Any]:
    return follow(rank, world, folder, [*QUICK], 3)


def one_expert(rank: int, world: int, folder: Path) -> list[Any]:
    return follow(rank, world, folder, ["galore_adamw"], 1)


WORKS = (methods, one_expert, beside, muon, resume, changed, shared, refused, other_axis)


def everything(rank: int, world: int, folder: Path) -> dict[str, Any]:
    return {work.__name__: work(rank, world, folder) for work in WORKS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What each process found, by work."""
    found = run(everything, 2, tmp_path_factory.mktemp("experts"))
    return {work.__name__: [own[work.__name__] for own in found] for work in WORKS}


@pytest.mark.slow
def test_experts_follow_one_process_to_the_bit(made: Made) -> None:
    for own in made["methods"]:
        check(own, [*QUICK], 3)


@pytest.mark.slow
def test_a_process_may_have_no_expert(made: Made) -> None:
    for own in made["one_expert"]:
        check(own, ["galore_adamw"], 1)


# Without processes


def batches(spread: list[bool], steps: list[int]) -> list[list[int]]:
    """Positions among the spread matrices, batch by batch."""
    processes = [Processes(group=object(), world=2) if own else ALONE for own in spread]  # type: ignore[arg-type]
    weights = [torch.zeros(8, 8) for _ in spread]
    states: list[dict[str, Any]] = [{} for _ in spread]
    group = {"foreach": True, "capturable": False}
    entries = [1 << 22] * len(spread)
    places = [i for i, own in enumerate(spread) if own]
    made = update_batches(weights, states, steps, entries, group, processes)
    found = [[places.index(i) for i in batch if spread[i]] for batch in made]
    return [batch for batch in found if batch]


def test_spread_matrices_are_updated_in_the_same_batches_everywhere() -> None:
    """However many experts a process has, and whatever their step counts."""
    alone = batches([True, True, True], [4, 5, 4])
    assert batches([False, True, False, True, True], [5, 4, 4, 5, 4]) == alone
    assert batches([False] * 3 + [True] * 3, [4, 4, 4, 4, 5, 4]) == alone


def test_spread_matrices_are_refitted_in_the_same_batches_everywhere() -> None:
    geometry = Geometry.of((16, 16), 4, "std")
    group = Processes(group=object(), world=2)  # type: ignore[arg-type]

    def param(rows: RowRange) -> ProjectedParam:
        held = torch.zeros(rows.stop - rows.start, 16)
        return ProjectedParam(held, held, {}, geometry, rows, 0, 0, "name")

    spread, local = param(RowRange(0, 8, group)), param(RowRange.whole(16))
    assert list(refresh_batches([local, spread, local])) == [[local, local], [spread]]
