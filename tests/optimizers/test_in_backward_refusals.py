"""What update_in_backward can't do raises one clear line, before anything is lost."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from in_backward_runs import backward, batch, loss_of, make, unexamined
from support import tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import (
    AdamW,
    GaLoreAdamW,
    build,
    param_groups,
    register_low_rank_hook,
    update_in_backward,
)


def unchanged(model: nn.Module) -> Callable[[], None]:
    """A check that no weight has changed since."""
    before = copy.deepcopy(model.state_dict())

    def check() -> None:
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    return check


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
        ({"max_norm": 0.0}, r"max_norm=0.0: accepted is a number in \(0.0, inf\]"),
        ({"max_norm": -1}, "max_norm=-1: accepted is a number"),
        ({"max_norm": float("nan")}, "max_norm=nan: accepted is a number"),
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
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_scaler_that_comes_later(unscale: bool, clip: float | None) -> None:
    model, optimizer = make()
    update_in_backward(optimizer, max_norm=clip)
    with unexamined():
        backward(model, 0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(0, 0))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="GradScaler with update_in_backward"):
        scaler.step(optimizer)


def test_a_scaler_that_is_off() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, batch(0, 0))).backward()
    scaler.step(optimizer)
    scaler.update()
    handle.remove()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


# Loops


@pytest.mark.parametrize("parts", [1, 2])
def test_more_backward_passes(parts: int) -> None:
    model, optimizer = make()
    update_in_backward(optimizer, parts)
    backward(model, 0, parts)
    check = unchanged(model)
    with pytest.raises(
        RuntimeError, match=f"backward pass {parts + 1} of a step, with accumulation"
    ):
        backward(model, 1)
    check()
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1, parts)
    optimizer.step()


def test_fewer_backward_passes() -> None:
    model, optimizer = make()
    update_in_backward(optimizer, 3)
    backward(model, 0, 2)
    check = unchanged(model)
    with pytest.raises(
        RuntimeError, match="after 2 of 3 backward passes: accepted are all of them"
    ):
        optimizer.step()
    check()
    backward(model, 0)
    optimizer.step()


def test_a_step_that_is_left_out() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    backward(model, 0)
    with pytest.raises(
        RuntimeError, match=r"zero_grad\(\) before step\(\), when 8 parameters were"
    ):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_backward_pass_with_an_error(parts: int) -> None:
    model, optimizer = make()
    update_in_backward(optimizer, parts)

    def fail(grad: torch.Tensor) -> None:
        raise MemoryError

    hook = model.mlp["up_proj"].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        backward(model, 0)
    with pytest.raises(RuntimeError, match=r"step\(\) after a backward pass that did not end"):
        optimizer.step()
    hook.remove()
    with pytest.raises(RuntimeError, match="before this one did not end: accepted is zero_grad"):
        backward(model, 0)
    if parts == 1:
        with pytest.warns(UserWarning, match=r"after \d parameters were updated: these updates"):
            optimizer.zero_grad()
    else:
        optimizer.zero_grad()
    backward(model, 0, parts)
    optimizer.step()


def test_rates_that_change_after_the_backward_pass() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    backward(model, 0)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    with pytest.raises(ValueError, match=r"learning rate.*were changed after a backward pass"):
        optimizer.step()
    optimizer.param_groups[0]["lr"].mul_(2.0)
    optimizer.step()
    backward(model, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="were changed after a backward pass"):
        optimizer.step()


@pytest.mark.parametrize("change", [{"maximize": True}, {"update_proj_gap": 1}, {"scale": 0.5}])
def test_options_that_change_between_micro_batches(change: dict[str, Any]) -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    for step in range(2):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 2)
    check = unchanged(model)
    optimizer.param_groups[0].update(change)
    if "scale" in change:
        backward(model, 2)  # needs no more than the projection
        return
    with pytest.raises(ValueError, match=r"left only a projection of the gradient of \S+weight"):
        backward(model, 2)
    check()


def test_state_that_is_cleared_between_micro_batches() -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    for step in range(2):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 2)
    optimizer.state.clear()
    with pytest.raises(ValueError, match="left only a projection of the gradient"):
        backward(model, 2)


@pytest.mark.parametrize("norm", ["exact", "projected"])
def test_options_that_change_before_a_step_that_clips(norm: Any) -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 1, 1.0, norm)
    backward(model, 0)
    optimizer.step()
    backward(model, 1)
    check = unchanged(model)
    optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(ValueError, match="left only a projection of the gradient"):
        optimizer.step()
    check()


def test_gradients_that_are_clipped_by_hand() -> None:
    """Some are gone; where all are whole it is right."""
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 1, 100.0)
    backward(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # all matrices are due
    optimizer.step()
    backward(model, 1)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="accepted is max_norm of update_in_backward in the place"):
        optimizer.step()


def test_gradients_that_are_cleared_behind_its_back() -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    for step in range(2):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 2)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"was replaced between backward passes.*zero_grad"):
        backward(model, 2)


def test_graphs_of_gradients() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    loss, check = loss_of(model, batch(0, 0)), unchanged(model)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    with pytest.raises(ValueError, match=r"backward\(create_graph=True\) of \S+ with update_in"):
        loss.backward(create_graph=True)
    check()


def test_sparse_gradients() -> None:
    model, optimizer = make()
    model.embed_tokens.sparse = True
    update_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has a sparse gradient"):
        backward(model, 0)


def test_layers_that_are_not_attached() -> None:
    model, optimizer = copy.deepcopy(make("relora_adamw"))
    update_in_backward(optimizer)
    check = unchanged(model)
    with pytest.raises(ValueError, match="has no layers, since it was copied"):
        backward(model, 0)
    check()


# Copies and states


def test_in_the_middle_of_a_step() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer, 2)
    backward(model, 0)
    state = optimizer.state_dict()
    for call, said in (
        (lambda: copy.deepcopy(optimizer), "a pickle or copy of the optimizer after 1 of 2"),
        (lambda: pickle.dumps(optimizer), "a pickle or copy of the optimizer after 1 of 2"),
        (handle.remove, r"remove\(\) after 1 of 2"),
        (lambda: optimizer.load_state_dict(state), r"load_state_dict\(\) after 1 of 2"),
        (lambda: setattr(handle, "accumulation", 3), "a change of accumulation after 1 of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="can't be copied"):
        copy.deepcopy(handle)
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(handle)
    backward(model, 0)
    with pytest.raises(
        ValueError, match=r"state_dict\(\) in the middle of a step, after a backward"
    ):
        optimizer.state_dict()
    optimizer.step()


def half_done(**options: Any) -> dict[str, Any]:
    """The state after three steps and one of two passes."""
    model, optimizer = make(update_proj_gap=10, **options)
    update_in_backward(optimizer, 2)
    for step in range(3):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_pending_gradients_without_a_handle() -> None:
    state, (_, optimizer) = half_done(), make(update_proj_gap=10)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match="saved after 1 backward passes of an unfinished step: acc"
    ):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("pending_projected", torch.zeros(3, 3)),
        ("pending_gradient", torch.zeros(1)),
        ("pending_gradient", 1.0),
    ],
)
def test_pending_gradients_that_do_not_fit(entry: str, value: Any) -> None:
    state, (_, optimizer) = half_done(), make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    key = next(key for key, own in state["state"].items() if entry in own)
    state["state"][key][entry] = value
    with pytest.raises(ValueError, match=f"has {entry} of shape .*; accepted is"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("passes", [3, -1, 1.0, None])
def test_numbers_of_passes_that_do_not_fit(passes: Any) -> None:
    state, (_, optimizer) = half_done(), make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    state["param_groups"][0]["in_backward_passes"] = passes
    with pytest.raises(
        ValueError, match="backward passes of an unfinished step: accepted is at most"
    ):
        optimizer.load_state_dict(state)


def test_a_full_weight_s_gradient_is_not_saved() -> None:
    model, optimizer = make("loqt_adamw")
    update_in_backward(optimizer, 2)
    backward(model, 0)
    with pytest.raises(ValueError, match="would lack the gradient of the full weight of"):
        optimizer.state_dict()


def test_without_warnings() -> None:
    """Right use says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model()
        optimizer = GaLoreAdamW(param_groups(model, rank=4), lr=1e-3)
        update_in_backward(optimizer, max_norm=1.0)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
