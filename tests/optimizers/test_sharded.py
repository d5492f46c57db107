"""Sharded and flattened parameters are refused by name, before anything is done with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import set_gradients, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowrank.optimizers import AdamW, LowRankOptimizer, build, param_groups

NAMES = ("adamw", "adamw_8bit", "adafactor", "muon", "galore_adamw", "relora_adamw")
PLAIN = "accepted are plain tensors, as under DistributedDataParallel or DeepSpeed's ZeRO stage 0"


@pytest.fixture
def two_processes() -> Iterator[None]:
    """Two processes as far as one can tell; what the other one sends is made up."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def sharded_model() -> nn.Module:
    model = tiny_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_distributed_tensors_are_refused_at_construction(name: str, two_processes: None) -> None:
    model = sharded_model()
    with pytest.raises(ValueError, match=rf"embed_tokens\.weight is a DTensor \(FSDP2.*{PLAIN}"):
        build(name, model, rank=4)
    assert isinstance(model.self_attn["q_proj"], nn.Linear)
    with pytest.raises(ValueError, match=rf"is a DTensor \(FSDP2.*{PLAIN}"):
        AdamW(model.parameters())


def test_distributed_tensors_are_refused_in_a_later_group(two_processes: None) -> None:
    optimizer = build("adamw", tiny_model())
    groups = len(optimizer.param_groups)
    weight = sharded_model().lm_head.weight
    with pytest.raises(ValueError, match=f"head is a DTensor.*{PLAIN}"):
        optimizer.add_param_group({"params": [("head", weight)]})
    assert len(optimizer.param_groups) == groups
    assert weight not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_distributed_tensors_are_refused_in_place_of_others(name: str, two_processes: None) -> None:
    model = tiny_model()
    optimizer = build(name, model)
    before = optimizer.state_dict()["state"]
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[name] for name in group["param_names"]]
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=rf"\.weight and \d more is a DTensor.*{PLAIN}"):
        optimizer.step()
    assert before.keys() == {*range(8)}


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_parameters_that_fsdp1_flattens_are_refused(
    original: bool, name: str, two_processes: None
) -> None:
    model = FullyShardedDataParallel(
        tiny_model(), use_orig_params=original, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=f"is flattened by FSDP1.*{PLAIN}"):
        build(name, model)
    with pytest.raises(ValueError, match=f"is flattened by FSDP1.*{PLAIN}"):
        AdamW(model.parameters())


def flat_groups(optimizer: LowRankOptimizer) -> None:
    """As ZeRO does it in stages 1 and 2: one flat partition in the place of a group's tensors."""
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.zeros_like(flat)
        group["params"] = [flat]


@pytest.mark.parametrize("named", [True, False])
def test_flat_partitions_are_refused_in_place_of_parameters(named: bool) -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model) if named else AdamW(model.parameters())
    set_gradients(model, 0)
    optimizer.step()
    flat_groups(optimizer)
    with pytest.raises(ValueError, match=rf"a flat partition of shape \(\d+,\) took.*{PLAIN}"):
        optimizer.step()


def test_partitions_of_zero_stage_3_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(0))
    weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="partitioned by DeepSpeed's ZeRO stage 3"):
        AdamW([weight])


def test_param_groups_say_so_first(two_processes: None) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is a DTensor"):
        param_groups(sharded_model())


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world
    )
    model = tiny_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    said = []
    for name in NAMES:
        try:
            build(name, model, rank=4)
        except ValueError as error:
            said.append(str(error))
    torch.save(said, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_fully_sharded_models_are_refused_on_each_process(world: int, tmp_path: Path) -> None:
    mp.spawn(_worker, (world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        said = torch.load(tmp_path / f"{world}-{rank}.pt")
        assert len(said) == len(NAMES)
        assert all("DTensor" in text and PLAIN in text for text in said)
