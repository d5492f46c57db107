"""What update_in_backward can't do raises one clear line, before anything is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from in_backward_runs import backward, batch, loss_of, make, unchanged, unexamined
from support import tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import (
    AdamW,
    build,
    register_low_rank_hook,
    update_in_backward,
)


@pytest.fixture
def examined() -> None:
    """For tests that need the look at all objects of the process."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> Iterator[None]:
    with contextlib.nullcontext() if "examined" in request.fixturenames else unexamined():
        yield


@pytest.fixture
def single() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulation": 0}, "accumulation=0: accepted is an integer of at least 1"),
        ({"accumulation": 2.0}, "accumulation=2.0: accepted is an integer"),
        ({"max_norm": 0.0}, "max_norm=0.0: accepted is a finite number above 0.0"),
        ({"max_norm": -1}, "max_norm=-1: accepted is a finite number"),
        ({"max_norm": float("nan")}, "max_norm=nan: accepted is a finite number"),
        ({"max_norm": 1.0, "norm": "whole"}, "norm='whole': accepted"),
        ({"norm": "previous"}, "norm='previous' without max_norm: accepted is max_norm"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    optimizer = make()[1]
    with pytest.raises(ValueError, match=said):
        update_in_backward(optimizer, **options)
    assert optimizer._in_backward is None


def test_other_optimizers() -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match="SGD: accepted is an optimizer of lowrank"):
        update_in_backward(torch.optim.SGD(model.parameters()))


def test_twice() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer)
    with pytest.raises(ValueError, match="is on for this optimizer: accepted is remove"):
        update_in_backward(optimizer)
    other = build("adamw", model)
    with pytest.raises(ValueError, match="another optimizer has these parameters: accepted is"):
        update_in_backward(other)
    handle.remove()
    update_in_backward(other)


def test_capturable() -> None:
    with pytest.raises(ValueError, match="capturable=True with update_in_backward: accepted is F"):
        update_in_backward(make(capturable=True)[1])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_there_twice() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight, weight])
    with pytest.raises(ValueError, match=r"shape \(3,\) twice in the groups: accepted is once"):
        update_in_backward(optimizer)


# Wrappers


@pytest.mark.usefixtures("single", "examined")
def test_ddp() -> None:
    model, optimizer = make()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"DistributedDataParallel, .*: accepted is fully_shard"):
        update_in_backward(optimizer)
    assert optimizer._in_backward is None
    model, optimizer = make()
    update_in_backward(optimizer)
    wrapped, check = DistributedDataParallel(model), unchanged(model)
    with pytest.raises(ValueError, match=r"DistributedDataParallel, .*: accepted is fully_shard"):
        backward(wrapped, 0)
    check()


@pytest.mark.usefixtures("single", "examined")
def test_shared_refreshes_and_low_rank_hooks() -> None:
    optimizer = make()[1]
    optimizer.share_refreshes()
    with pytest.raises(ValueError, match="after share_refreshes"):
        update_in_backward(optimizer)
    model, optimizer = make()
    update_in_backward(optimizer)
    with pytest.raises(ValueError, match="with update_in_backward, before DDP averages"):
        optimizer.share_refreshes()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="with update_in_backward, before DDP averages"):
        register_low_rank_hook(wrapped, optimizer)
    assert not wrapped._comm_hooks


@pytest.mark.usefixtures("single", "examined")
def test_copies_that_nobody_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.warns(UserWarning, match="on 2 processes with parameters that are not sharded"):
        update_in_backward(make()[1])


@pytest.mark.parametrize("mark", ["_hp_mapping", "_z3_optimizer", "ds_id"])
def test_deepspeed(mark: str) -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer)
    setattr(model.norm.weight, mark, 1)
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"norm\.weight in DeepSpeed's ZeRO"):
        backward(model, 0)
    check()
    optimizer.zero_grad()
    handle.remove()
    with pytest.raises(ValueError, match=r"norm\.weight in DeepSpeed's ZeRO"):
        update_in_backward(optimizer)


@pytest.mark.usefixtures("examined")
def test_deepspeed_without_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    module = type(torch)("deepspeed")
    module.DeepSpeedEngine = DeepSpeedEngine
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", module)
    model, optimizer = make()
    update_in_backward(optimizer)
    engine, check = DeepSpeedEngine(model), unchanged(model)
    with pytest.raises(ValueError, match="update_in_backward with DeepSpeedEngine"):
        backward(engine.module, 0)
    check()


# GradScaler


@pytest.mark.usefixtures("examined")
def test_a_scaler() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    scaler, check = torch.amp.GradScaler("cpu"), unchanged(model)
    loss = scaler.scale(loss_of(model, batch(0, 0)))
    with pytest.raises(ValueError, match="GradScaler with update_in_backward"):
        loss.backward()
    check()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("norm", [None, "previous"])
def test_a_scaler_that_comes_later(unscale: bool, norm: Any) -> None:
    model, optimizer = make()
    clipping = {} if norm is None else {"max_norm": 1.0, "norm": norm}
    update_in_backward(optimizer, **clipping)
    with unexamined():
        backward(model, 0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(0, 0))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="GradScaler with update_in_backward"):
        scaler.step(optimizer)


def test_gradients_that_are_unscaled_by_hand() -> None:
    model, optimizer = make()
    update_in_backward(optimizer, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(0, 0))).backward()
    scaler.unscale_(optimizer)
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"unscale_.*accepted is max_norm of update_in_backward"):
        scaler.step(optimizer)
    check()


def test_a_scaler_that_is_off() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, batch(0, 0))).backward()
    scaler.step(optimizer)
    scaler.update()
    handle.remove()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
