"""What every optimizer owes a training loop, for each row of the table."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import set_gradients, tiny_model, trained, weights
from table import (
    TABLE,
    Row,
    assert_close,
    assert_same,
    every,
    every_slowly,
    every_with,
    representative,
    train,
)
from torch import nn

from lowrank.optimizers import available


def test_table_is_complete() -> None:
    assert sorted({row.name for row in TABLE}) == available()


@every
def test_every_parameter_moves_and_stays_finite(row: Row) -> None:
    model = row.prepare(tiny_model())
    before = weights(model)
    train(model, row.build(model), range(5))
    for old, param in zip(before, trained(model), strict=True):
        assert param.isfinite().all()
        assert not torch.equal(old, param)


@every_slowly
def test_learns_a_task(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, **row.full_scale)
    tokens = torch.randint(0, 32, (8, 12))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@representative
def test_closure_gets_gradients(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    tokens = torch.randint(0, 32, (2, 4))

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert torch.is_tensor(first)
    assert first.requires_grad
    assert optimizer.step(closure) < first


@every
def test_lr_is_read_each_step_as_float_or_tensor(row: Row) -> None:
    by_float, by_tensor = tiny_model(), tiny_model()
    first = row.build(by_float, lr=1e-2)
    second = row.build(by_tensor, lr=torch.tensor(1e-2))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (first, second)]
    for step in range(4):
        for model, optimizer in ((by_float, first), (by_tensor, second)):
            train(model, optimizer, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert_close(by_float, by_tensor, rtol=1e-5, atol=1e-7)
    still = row.build(by_float, lr=0.0, **row.quiet)
    if row.rebases:
        train(by_float, still, range(4, 5))
    frozen = weights(by_float)
    train(by_float, still, range(4, 5))
    assert all(torch.equal(a, b) for a, b in zip(frozen, trained(by_float), strict=True))
    for group in still.param_groups:
        group["lr"] = 0.1
    train(by_float, still, range(5, 6))
    left = row.still_factors(by_float)
    for old, param in zip(frozen, trained(by_float), strict=True):
        assert torch.equal(old, param) is (param in left)


@representative
def test_maximize_ascends(row: Row) -> None:
    down, up = tiny_model(), tiny_model()
    descending, ascending = row.build(down), row.build(up, maximize=True)
    for step in range(4):
        set_gradients(down, step)
        set_gradients(up, step)
        for a, b in zip(trained(down), trained(up), strict=True):
            b.grad = -a.grad
        descending.step()
        ascending.step()
    assert_same(down, up)


@every_with(
    "options",
    [{"foreach": False}, {"foreach": True}, {"fused": False}, {"skip_nonfinite": False}],
)
def test_implementations_agree(row: Row, options: dict[str, bool]) -> None:
    default, other = tiny_model(), tiny_model()
    train(default, row.build(default), range(7))
    train(other, row.build(other, **options), range(7))
    # A moment that sits between two 8-bit codes may go either way in the last bit.
    assert_close(default, other, rtol=1e-4, atol=row.slack)


@every
def test_capturable(row: Row) -> None:
    if not row.capturable:
        with pytest.raises(ValueError, match="capturable"):
            row.build(tiny_model(), capturable=True)
        return
    plain, captured = tiny_model(), tiny_model()
    train(plain, row.build(plain), range(7))
    train(captured, row.build(captured, capturable=True, lr=torch.tensor(1e-2)), range(7))
    assert_close(plain, captured, rtol=1e-4, atol=row.slack)


@every
def test_weight_decay_shrinks_weights_by_lr_times_decay(row: Row) -> None:
    model = row.prepare(tiny_model())
    optimizer = row.build(model, lr=0.1, weight_decay=0.5, **row.quiet)
    for param in trained(model):
        param.grad = torch.zeros_like(param)
    factors = {p for g in optimizer.param_groups if g.get("factors") for p in g["params"]}
    before = weights(model)
    optimizer.step()
    for old, param in zip(before, trained(model), strict=True):
        # vectors (norms and biases) are not decayed, but for those that a weight is made of
        decayed = param.dim() > 1 or param in factors
        if row.name == "sst_adamw" and param in factors:
            decayed = param.dim() == 1  # singular values; vectors keep their length
        decayed = decayed and param not in row.still_factors(model)
        expected = old * (1 - 0.1 * 0.5) if decayed else old
        torch.testing.assert_close(param.detach(), expected)


@representative
def test_complex_parameters_raise(row: Row) -> None:
    with pytest.raises(ValueError, match="complex64"):
        row.optimizer([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], lr=0.1)


@representative
def test_step_inside_autocast_equals_step_outside(row: Row) -> None:
    outside, inside = tiny_model(), tiny_model()
    first, second = row.build(outside), row.build(inside)
    train(outside, first, range(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(inside, second, range(4))
    assert_same(outside, inside)


@representative
def test_add_param_group_later_and_all_or_nothing(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "param_names": ["extra"]})
    assert extra in optimizer.state
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(3))], "param_names": ["x"], "weight_decay": -1.0}
        )
    assert len(optimizer.param_groups) == groups
    extra.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3))


@representative
def test_parameter_names_are_recorded(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "param_names" in optimizer.state_dict()["param_groups"][0]


BAD_ARGUMENTS = (
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"lr": "fast"}, "lr='fast'"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"foreach": "yes"}, "foreach='yes'"),
    ({"differentiable": True}, "differentiable=True"),
    ({"foreach": True, "fused": True}, "foreach=True with fused=True"),
    ({"wight_decay": 0.1}, "weight_decay"),
)


@representative
@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_name_the_value(row: Row, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row.build(tiny_model(), **options)
