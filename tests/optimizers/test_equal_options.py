"""Options and learning rates that differ between processes are told, with their values."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import Recorder, block, run, shard, tokens, train
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import GaLoreAdamW, LowRankOptimizer, build, register_low_rank_hook
from lowrank.optimizers.engine.equal_options import PERIOD, STAMP_BYTES

pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {"rank": 4, "update_proj_gap": 5}
#: What is said of a run, and after how many of its steps.
Told = tuple[str, int]


def step(model: nn.Module, optimizer: LowRankOptimizer, number: int) -> None:
    rows = tokens(number, 0, rows=2)
    logits = model(rows[:, :-1])
    functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def told(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    change: Callable[[dict[str, Any]], None],
    at: int,
    steps: int,
) -> Told:
    """What is said when a process's options change before step `at`, if it is not None there."""
    for number in range(steps):
        if number == at:
            change(optimizer.param_groups[0])
        before = [param.detach().clone() for param in model.parameters()]
        try:
            step(model, optimizer, number)
        except ValueError as error:
            same = zip(before, model.parameters(), strict=True)
            assert all(torch.equal(*map(_local, pair)) for pair in same)
            return str(error), number
    return "nothing", steps


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def cases(rank: int, world: int, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    mesh = DeviceMesh("cpu", torch.arange(world))
    pairs = DeviceMesh("cpu", torch.arange(world).view(world, 1), mesh_dim_names=("a", "b"))

    def change(**values: Any) -> Callable[[dict[str, Any]], None]:
        """A change of the last process alone."""
        return lambda group: group.update(values) if rank == world - 1 else None

    def sharded(name: str, at: int, changed: Any, steps: int = 4, **more: Any) -> Told:
        model = shard(block(), mesh)
        optimizer = build(name, model, lr=0.01, **{**OPTIONS, **more})
        return told(model, optimizer, changed, at, steps)

    def replicated(at: int, changed: Any, *, early: bool = True) -> Told:
        model = block()
        parallel = None if early else DistributedDataParallel(model)
        optimizer = build("galore_adamw", model, lr=0.01, **OPTIONS)
        parallel = parallel or DistributedDataParallel(model)
        return told(parallel, optimizer, changed, at, PERIOD + 2)

    def by_groups(*, parts: bool = False) -> Told:
        """Or an optimizer of a part of the parameters, another one on each process."""
        model = block()
        matrices = [param for param in model.parameters() if param.dim() == 2]
        vectors = [param for param in model.parameters() if param.dim() == 1]
        groups = [{"params": matrices, **OPTIONS}, {"params": vectors}]
        optimizer = GaLoreAdamW(groups[rank : rank + 1] if parts else groups, lr=0.01)
        return told(DistributedDataParallel(model), optimizer, change(weight_decay=0.5), 0, 2)

    def second(changed: Callable[[dict[str, Any]], None]) -> Told:
        """One of two optimizers of a model, both on all processes."""
        model = block()
        vectors = [param for param in model.parameters() if param.dim() == 1]
        optimizer = GaLoreAdamW([{"params": vectors}], lr=0.01)
        return told(DistributedDataParallel(model), optimizer, changed, 0, 3)

    def pair_of_copies() -> Told:
        model = block()
        fully_shard(model, mesh=pairs)
        optimizer = build("galore_adamw", model, lr=0.01, **OPTIONS)
        return told(model, optimizer, change(lr=0.02), 0, 2)

    def quantised(bits: int, seed: int, *, hook: bool = False) -> Told:
        model = block(seed)
        optimizer = build("galore_adamw", model, lr=0.01, weight_bits=bits, **OPTIONS)
        parallel = DistributedDataParallel(model)
        if hook:
            register_low_rank_hook(parallel, optimizer)
        return told(parallel, optimizer, change(), 0, 3)

    def hooked() -> Told:
        model = DistributedDataParallel(block())
        optimizer = build("galore_adamw", model.module, lr=0.01, **OPTIONS)
        register_low_rank_hook(model, optimizer)
        return told(model, optimizer, change(lr=0.02), 2, 4)

    def shared() -> Told:
        model = block()
        optimizer = build("galore_adamw", model, lr=0.01, **OPTIONS)
        optimizer.share_refreshes()
        return told(model, optimizer, change(lr=0.02), 3, 7)

    return {
        "fsdp rate": sharded("galore_adamw", 0, change(lr=0.02)),
        "fsdp scheduled rate": sharded("galore_adamw", 2, change(lr=0.005)),
        "fsdp gap": sharded("galore_adamw", 2, change(update_proj_gap=2)),
        "fsdp rank": sharded("galore_adamw", 1, change(rank=3)),
        "fsdp plain": sharded("adamw", 1, change(betas=(0.8, 0.9))),
        "fsdp unchecked": sharded("adamw", 0, change(lr=0.02), skip_nonfinite=False),
        "fsdp layers": sharded("adamw", 1, change(weight_decay=0.3)),
        "fsdp equal": sharded("galore_adamw", 0, lambda group: group.update(lr=0.02)),
        "copies of shards": pair_of_copies(),
        "ddp rate": replicated(0, change(lr=0.02)),
        "ddp wrapped before": replicated(0, change(scale=0.5), early=False),
        "ddp later": replicated(1, change(lr=0.02)),
        "ddp equal": replicated(0, lambda group: group.update(lr=0.02)),
        "ddp groups": by_groups(),
        "ddp parts": by_groups(parts=True),
        "ddp 4 bits": quantised(4, rank),
        "ddp 8 bits": quantised(8, rank),
        "ddp 4 bits hook": quantised(4, rank, hook=True),
        "ddp 4 bits equal": quantised(4, 0),
        "ddp second": second(change(weight_decay=0.5)),
        "ddp second again": second(lambda group: group.update(weight_decay=0.25)),
        "hook": hooked(),
        "shared": shared(),
        "sent": sent(mesh),
    }


def sent(mesh: DeviceMesh) -> dict[str, Any]:
    """Collectives of second steps."""
    found: dict[str, Any] = {}
    for called, model in (("fsdp", shard(block(), mesh)), ("ddp", block())):
        parallel = DistributedDataParallel(model) if called == "ddp" else model
        optimizer = build("galore_adamw", model, lr=0.01, **OPTIONS)
        train(parallel, optimizer, range(1))
        pickle.loads(pickle.dumps(optimizer.state_dict()))
        rows = tokens(1, 0, rows=2)
        functional.cross_entropy(
            parallel(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        ).backward()
        recorder = Recorder()
        with recorder.recording():
            optimizer.step()
        found[called] = recorder.calls, len([*model.parameters()])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(cases, 2, tmp_path_factory.mktemp("two"))


EXPECTED = {
    "fsdp rate": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", 0),
    "fsdp scheduled rate": ("lr of group 0", "0.01 on process 0 and 0.005 on process 1", 2),
    "fsdp gap": ("update_proj_gap of group 0", "5 on process 0 and 2 on process 1", 2),
    "fsdp rank": ("rank of group 0", "4 on process 0 and 3 on process 1", 1),
    "fsdp plain": ("betas of group 0", "(0.9, 0.999) on process 0 and (0.8, 0.9) on process 1", 1),
    "fsdp unchecked": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", 0),
    "fsdp layers": ("weight_decay of group 0", "on process 0 and 0.3 on process 1", 1),
    "copies of shards": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", 0),
    "ddp rate": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", 0),
    "ddp wrapped before": ("scale of group 0", "0.25 on process 0 and 0.5 on process 1", 0),
    "ddp later": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", PERIOD),
    "ddp groups": ("weight_decay of group 0", "on process 0 and 0.5 on process 1", 0),
    "ddp 4 bits": ("quantised weights (a checksum) of group 0", "on process 1 differ", 0),
    "ddp 8 bits": ("quantised weights (a checksum) of group 0", "on process 1 differ", 0),
    "ddp 4 bits hook": ("quantised weights (a checksum) of group 0", "on process 1 differ", 0),
    "ddp second": ("weight_decay of group 0", "0.5 on process 1 differ", 1),
    "hook": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", 2),
    "shared": ("lr of group 0", "0.01 on process 0 and 0.02 on process 1", 5),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_differs_is_told_on_all_processes(case: str, found: list[dict[str, Any]]) -> None:
    option, values, number = EXPECTED[case]
    message, at = found[0][case]
    assert found[1][case] == (message, at)
    assert at == number
    assert option in message
    assert values in message


def test_equal_options_are_no_reason_to_complain(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["fsdp equal"] == ("nothing", 4)
        assert each["ddp equal"] == ("nothing", PERIOD + 2)
        assert each["ddp 4 bits equal"] == ("nothing", 3)
        assert each["ddp parts"] == ("nothing", 2)
        assert each["ddp second again"] == ("nothing", 3)


def test_a_step_has_no_collective_more(found: list[dict[str, Any]]) -> None:
    """One decision; what is left-projected shares a reduction and a gathering; none under DDP."""
    for each in found:
        calls, count = each["sent"]["fsdp"]
        assert len(calls) == 3
        name, _, size = calls[0]
        assert (name, size) == ("all_reduce", STAMP_BYTES + 4 * count)
        assert each["sent"]["ddp"][0] == []
