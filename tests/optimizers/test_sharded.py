"""Sharded and flattened parameters are refused by name, before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support import set_gradients, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowrank.optimizers import AdamW, LowRankOptimizer, build

PLAIN = (
    "accepted are plain tensors, as under DistributedDataParallel or DeepSpeed's ZeRO stage 0, "
    r"and FSDP2's \(fully_shard\)"
)
ACCEPTED = r"accepted is one Shard\(0\), or Shard\(1\) of a matrix, and Replicate over other"


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


def placed(*placements: Placement, mesh: tuple[int, ...] = (2,)) -> nn.Parameter:
    shape = torch.ones(8, 6).size()
    local = torch.ones(8, 6)
    made = DTensor.from_local(
        local,
        init_device_mesh("cpu", mesh),
        placements,
        run_check=False,
        shape=shape,
        stride=(6, 1),
    )
    return nn.Parameter(made)


@pytest.mark.parametrize(
    ("placements", "mesh", "said"),
    [
        ((Partial(),), (2,), r"\(P\(sum\)\)"),
        ((Shard(0), Shard(0)), (1, 2), r"\(S\(0\), S\(0\)\)"),
        ((_StridedShard(0, split_factor=2), Shard(0)), (1, 2), r"_S\(0, 2\)"),
    ],
    ids=str,
)
def test_other_placements_are_refused_by_name(
    placements: tuple[Placement, ...], mesh: tuple[int, ...], said: str, two_processes: None
) -> None:
    weight = placed(*placements, mesh=mesh)
    with pytest.raises(
        ValueError, match=rf"head is a DTensor with placements .*{said}.*{ACCEPTED}"
    ):
        AdamW([("head", weight)])
    optimizer = build("adamw", tiny_model())
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=rf"head is a DTensor with placements .*{ACCEPTED}"):
        optimizer.add_param_group({"params": [("head", weight)]})
    assert len(optimizer.param_groups) == groups
    assert weight not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_shards_in_place_of_whole_parameters_are_refused(name: str, two_processes: None) -> None:
    """`fully_shard` after `build` would otherwise train nothing, or lose the state."""
    model = tiny_model()
    optimizer = build(name, model)
    set_gradients(model, 0)
    optimizer.step()
    before = optimizer.state_dict()["state"]
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[name] for name in group["param_names"]]
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=r"a DTensor took the place of .* after fully_shard"):
        optimizer.step()
    assert before.keys() == {*range(8)}


def test_a_model_that_was_sharded_since_is_told_of(two_processes: None) -> None:
    """All of it, or a part: the others' gradients would hide that it is not trained."""
    for part in ("", "mlp.up_proj"):
        model = tiny_model()
        optimizer = build("galore_adamw", model, rank=4)
        set_gradients(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        fully_shard(model.get_submodule(part), mesh=init_device_mesh("cpu", (2,)))
        for name, param in model.named_parameters():
            if not name.startswith(part):
                param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=r"replaced in the model .* after fully_shard"):
            optimizer.step()


def test_a_model_that_is_sharded_already_is_not_converted(two_processes: None) -> None:
    model = sharded_model()
    for name in ("relora_adamw", "sltrain_adamw", "qgalore_adamw_8bit"):
        with pytest.raises(ValueError, match=r"inside fully_shard .* before wrapping"):
            build(name, model, rank=4)
    assert isinstance(model.self_attn["q_proj"], nn.Linear)


def test_heads_that_share_a_basis_are_not_spread(two_processes: None) -> None:
    with pytest.raises(ValueError, match=r"q_proj\.weight is spread over processes.*heads share"):
        build("galore_plus_adamw", sharded_model(), rank=4, heads=4)


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
