"""Converted models inside DDP with its own defaults: what travels, and what is checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import start
from support import tiny_model, trained
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import build, convert, merge

METHODS: dict[str, dict[str, Any]] = {
    "loqt_adamw": {"update_proj_gap": 2},
    "low_rank_adamw": {},
    "relora_adamw": {"update_proj_gap": 2},
    "sltrain_adamw": {"density": 0.1},
    "sst_adamw": {"update_proj_gap": 2},
    "switchlora_adamw": {"switch_interval": 10.0, "offload": True},
}
methods = pytest.mark.parametrize("name", METHODS)
TOKENS = torch.arange(12).view(2, 6)


class Parent(nn.Module):
    """What a training framework puts around a model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.network(tokens).flatten(0, 1), tokens.flatten())


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["relora_adamw", "qgalore_adamw_8bit"])
def test_a_module_inside_ddp_is_not_converted(name: str) -> None:
    model = nn.Sequential()
    model.mlp = nn.Linear(256, 16, bias=False)
    parallel = DistributedDataParallel(model)
    before = list(model.modules())
    for call in (convert, build):
        with pytest.raises(ValueError, match=r"inside DistributedDataParallel can't be converted"):
            call(name, parallel.module)
    assert list(model.modules()) == before
    del parallel
    convert(name, model)


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """The tensors that are broadcast while it lasts."""
    sent: list[Tensor] = []
    plain = dist._broadcast_coalesced

    def watched(group: Any, tensors: list[Tensor], *others: Any) -> None:
        sent.extend(tensors)
        plain(group, tensors, *others)

    dist._broadcast_coalesced = watched
    try:
        yield sent
    finally:
        dist._broadcast_coalesced = plain


def size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def bytes_sent(wrapped: nn.Module, module: nn.Module) -> tuple[int, list[int]]:
    """Broadcast bytes at construction, and in each of three forward passes."""
    with recorded() as sent:
        parallel = DistributedDataParallel(wrapped)
        assert all(tensor.device.type == "cpu" for tensor in sent)
        made = size(sent)
    passes = []
    for _ in range(3):
        with recorded() as sent:
            if wrapped is module:
                parallel(TOKENS).sum().backward()
            else:
                parallel(TOKENS).backward()
        passes.append(size(sent))
    return made, passes


@methods
@pytest.mark.usefixtures("alone")
def test_nothing_but_what_is_trained_travels(name: str) -> None:
    model = tiny_model()
    build(name, model, rank=4, **METHODS[name])
    assert bytes_sent(model, model) == (size(trained(model)), [0, 0, 0])


@methods
@pytest.mark.usefixtures("alone")
def test_a_part_or_a_parent_may_be_wrapped(name: str) -> None:
    parent = Parent(tiny_model())
    build(name, parent.network, rank=4, **METHODS[name])
    for part in (parent.network.mlp, parent.network.mlp["up_proj"]):
        with recorded() as sent:
            DistributedDataParallel(part)
        assert size(sent) == size(trained(part))
    convert(name, parent)  # converted already: marks the parent
    own = parent.seen.nbytes
    expected = size(trained(parent)) + own, [own] * 3
    assert bytes_sent(parent, parent.network) == expected


@pytest.mark.usefixtures("alone")
def test_host_tensors_are_out_of_reach_of_a_parent_that_is_not_marked() -> None:
    parent = Parent(tiny_model())
    build("switchlora_adamw", parent.network, rank=4, offload=True)
    with recorded() as sent:
        DistributedDataParallel(parent)
    assert size(sent) == size(parent.parameters()) + parent.seen.nbytes
    assert all(tensor.is_floating_point() for tensor in sent)  # selected is int64


def test_marks_keep_a_users_own_and_go_with_merge() -> None:
    model = tiny_model()
    model._ddp_params_and_buffers_to_ignore = ["norm.bias"]
    convert("relora_adamw", model, rank=4)
    frozen = "mlp.up_proj.frozen"
    assert {"norm.bias", frozen} <= {*model._ddp_params_and_buffers_to_ignore}
    assert "up_proj.frozen" in model.mlp._ddp_params_and_buffers_to_ignore
    merge(model)
    assert model._ddp_params_and_buffers_to_ignore == ["norm.bias"]
    assert not hasattr(model.mlp, "_ddp_params_and_buffers_to_ignore")


# Two processes


def _worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        *("gloo", f"file://{folder}/store", timedelta(seconds=60)), rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    for name, options in METHODS.items():
        model = tiny_model()
        build(name, model, rank=4, **options)
        found[name] = bytes_sent(model, model) == (size(trained(model)), [0, 0, 0])
        other = Parent(tiny_model(seed=rank))
        convert(name, other, rank=4)
        try:
            DistributedDataParallel(other, broadcast_buffers=False)(TOKENS)
        except RuntimeError as error:
            found[f"{name} unequal"] = str(error)
        unmarked = Parent(tiny_model())
        convert(name, unmarked.network, rank=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            DistributedDataParallel(unmarked)(TOKENS)
        found[f"{name} said"] = [str(w.message) for w in caught if "frozen" in str(w.message)]
    found["loqt without a gradient"] = _loqt_with_an_unused_layer(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _loqt_with_an_unused_layer(rank: int) -> list[Tensor]:
    """Rank 1's tokens don't run through one of the layers, whose basis rank 0 makes anew."""
    model = nn.ModuleDict({"mlp_a": nn.Linear(6, 8), "mlp_b": nn.Linear(6, 8)})
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.1).view(-1)[::3].mul_(-2.0)
    optimizer = build("loqt_adamw", model, lr=1e-2, rank=2, update_proj_gap=2)
    x = torch.arange(18.0).view(3, 6).sin()
    for step in range(6):
        optimizer.zero_grad()
        y = model["mlp_a"](x + step).square().sum()
        if rank == 0:
            y = y + model["mlp_b"](x - step).square().sum()
        y.backward()
        for name in ("mlp_a", "mlp_b"):
            for param in model[name].parameters():
                grad = param.grad if param.grad is not None else torch.zeros_like(param)
                dist.all_reduce(grad)
                param.grad = grad
        optimizer.step()
    weights = [layer.effective_weight() for layer in model.values()]
    return weights + [layer.basis.dense(torch.float32) for layer in model.values()]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    start(_worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in METHODS:
        assert first[name]
        assert second[name]
        if name in ("low_rank_adamw", "sltrain_adamw"):  # nothing of the model's own is frozen
            assert f"{name} unequal" not in first
        else:
            assert "differ between processes" in first[f"{name} unequal"]
            assert first[f"{name} unequal"] == second[f"{name} unequal"]
            assert "network.self_attn.q_proj" in first[f"{name} unequal"]
        if name in ("loqt_adamw", "sltrain_adamw", "switchlora_adamw"):  # buffers
            assert "convert(name, module)" in first[f"{name} said"][0]
        else:
            assert not first[f"{name} said"]
    key = "loqt without a gradient"
    assert all(map(torch.equal, first[key], second[key]))
    assert all(bool(tensor.any()) for tensor in first[key])
