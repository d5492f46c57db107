"""State that is missing, that follows its parameter, and that does not belong to it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import equal, set_gradients, tiny_model
from table import TABLE, Row, every, every_with, identifier, representative, train, weight_of
from torch import Tensor, nn

from lowrank.optimizers import AdamW, GaLoreAdamW, LowRankOptimizer, build, state_bytes


def layout(optimizer: LowRankOptimizer) -> list[dict[str, Any]]:
    return [
        {k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in state.items()}
        for group in optimizer.param_groups
        for state in (optimizer.state[param] for param in group["params"])
    ]


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
}


@every
@pytest.mark.parametrize("cast", CASTS)
def test_state_without_a_step_follows_a_cast(row: Row, cast: str) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    CASTS[cast](model)
    twin = CASTS[cast](row.prepare(tiny_model()))
    other = row.build(twin)
    other.load_state_dict(optimizer.state_dict())
    other = row.build(twin)
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    assert layout(optimizer) == layout(other)
    assert state_bytes(optimizer) == state_bytes(other)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@every_with("how", ["trained", "copied", "loaded"])
@pytest.mark.parametrize("cast", CASTS)
def test_state_with_steps_and_another_dtype_is_refused(row: Row, cast: str, how: str) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    if how == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
        row.link(optimizer, model)
    elif how == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    CASTS[cast](model)
    set_gradients(model, 2)
    before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match="cast the model first, then build the optimizer"):
        optimizer.step()
    for a, b in zip(before[0], model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert equal(before[1], optimizer.state_dict()["state"])
    model.float()
    train(model, optimizer, range(2, 3))


@every
@pytest.mark.parametrize("steps", [0, 2])
def test_missing_state_is_made_at_the_next_step(row: Row, steps: int) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(steps))
    optimizer.state.clear()
    twin = copy.deepcopy(model)
    other = row.build(twin)
    if steps:
        optimizer.state_dict()
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    if row.rebases and steps:
        return  # the new optimizer's layers collect a gradient more
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_missing_state_is_made_and_the_others_stay() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train(model, optimizer, range(3))
    one = model.self_attn["q_proj"].weight
    del optimizer.state[one]
    train(model, optimizer, range(3, 5))
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert float(optimizer.state[one]["step"]) == 2
    assert steps == {2.0, 5.0}


@representative
def test_incomplete_state_is_refused(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    weight = weight_of(model.self_attn["q_proj"])
    key = next(key for key in optimizer.state[weight] if key.startswith(("exp_avg", "momentum")))
    lost = optimizer.state[weight].pop(key)
    set_gradients(model, 2)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=rf"the state of .* lacks \['{key}'\]"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.state[weight][key] = lost
    optimizer.step()


@pytest.mark.parametrize("row", [row for row in TABLE if not row.factored], ids=identifier)
def test_parameters_exchanged_for_others_of_their_shapes(row: Row) -> None:
    model, twin = tiny_model(), tiny_model()
    optimizer, other = row.build(model), row.build(twin)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(param.detach().clone()) for param in group["params"]]
    optimizer.state_dict()  # nothing is left of the first ones
    pairs = [
        (a, b)
        for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True)
        for a, b in zip(mine["params"], theirs["params"], strict=True)
    ]
    for step in range(4):
        set_gradients(twin, step)
        for a, b in pairs:
            a.grad = b.grad.clone()
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(optimizer.state) == len(pairs)


def test_trained_state_of_no_group_is_kept_until_it_is_taken_out() -> None:
    """As in `torch.optim`, where a parameter may be left out for a while; a file has no place."""
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW(weights)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones(3)
        optimizer.step()
    optimizer.param_groups[0]["params"] = weights[:1]
    optimizer.step()
    with pytest.raises(ValueError, match=r"in no group: accepted is optimizer.state.pop"):
        optimizer.state_dict()
    optimizer.param_groups[0]["params"] = weights
    optimizer.step()
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [4.0, 3.0]
    optimizer.state_dict()


def test_another_shape_in_the_same_parameter_is_noticed() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = AdamW([weight])
    weight.data = torch.ones(6, 3)
    weight.grad = torch.ones(6, 3)
    optimizer.step()
    weight.grad, weight.data = None, torch.ones(2, 3)
    weight.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"has exp_avg of shape \(6, 3\); accepted is \(2, 3\)"):
        optimizer.step()


def test_state_that_was_left_on_another_device_is_moved() -> None:
    """The meta device stands for another one."""
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train(model, optimizer, range(2))
    for group in optimizer.param_groups:
        group["params"] = [
            nn.Parameter(param.detach().to("meta"), param.requires_grad)
            for param in group["params"]
        ]
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    old = list(optimizer.state.values())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(zip(params, old, strict=True))
    optimizer._prepare()
    for state in optimizer.state.values():
        assert all(v.is_meta for v in state.values() if isinstance(v, Tensor))


def test_resuming_after_a_cast_before_the_first_step() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    model.bfloat16()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = build("galore_adamw", tiny_model(dtype=torch.bfloat16), rank=4)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert layout(other) == layout(optimizer)


def test_state_that_is_cleared_leaves_the_memory() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train(model, optimizer, range(2))
    optimizer.state_dict()
    held = [weakref.ref(s["exp_avg"]) for s in optimizer.state.values() if "exp_avg" in s]
    assert all(reference() is not None for reference in held)
    optimizer.state.clear()
    gc.collect()
    assert all(reference() is None for reference in held)


def test_a_parameter_that_is_in_a_group_twice_changes_its_options_once() -> None:
    weight = nn.Parameter(torch.randn(8, 6))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = GaLoreAdamW([{"params": [weight, weight], "rank": 2}])
    for _ in range(2):
        weight.grad = torch.randn(8, 6)
        optimizer.step()
        optimizer.param_groups[0]["rank"] = 4
    assert optimizer.state[weight]["exp_avg"].shape == (8, 4)
