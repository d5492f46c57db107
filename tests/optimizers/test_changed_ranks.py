"""What becomes of bases and moments when the rank is changed in the middle of training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from changed_options import BETAS, SHAPES, galore, gradient, row_named, run
from support import matrix, set_gradients, tiny_model
from table import train
from torch import Tensor, nn

from lowrank.optimizers import (
    CoapAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreMuon,
    GaLorePlusAdamW,
    LowRankOptimizer,
    OnlineSubspaceLion,
    build,
)


@pytest.mark.filterwarnings("ignore:.*no parameter group has a rank")
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "fira_adamw", "coap_adamw"])
@pytest.mark.parametrize("changed", [{"rank": 8}, {"rank": 2}, {"rank": None}], ids=str)
def test_moments_of_another_shape_start_anew(name: str, changed: dict[str, Any]) -> None:
    """From then on all is as with a new optimizer."""
    row, model = row_named(name), tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(4))
    twin = copy.deepcopy(model)
    optimizer.param_groups[0].update(changed)
    pairs = zip(optimizer.param_groups, row.build(twin).param_groups, strict=True)
    other = row.optimizer([{**group, "params": list(own["params"])} for group, own in pairs])
    for step in range(4, 9):
        set_gradients(model, step)
        optimizer.step()
        set_gradients(twin, step)
        other.step()
    pairs = [made.param_groups[0]["params"] for made in (optimizer, other)]
    for param, same in zip(*pairs, strict=True):
        assert torch.equal(param, same)
        assert optimizer.state[param].keys() == other.state[same].keys()


def expected_moments(
    how: str, m: Tensor, v: Tensor, left: Tensor | None, right: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    def carry(low: Tensor, square: bool = False) -> Tensor:
        for side, c in ((0, left), (1, right)):
            if c is not None:
                c = c.square() if square else c
                low = c @ low if side == 0 else low @ c.T
        return low

    if how == "restore":
        return carry(m), carry(v.sqrt()).square()
    c1, c2 = (1 - beta**steps for beta in BETAS)
    mean = carry(m) / c1
    variance = carry(v / c2 - (m / c1).square(), square=True)
    return c1 * mean, c2 * (variance + mean.square()).abs()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("how", ["restore", "rotate"])
@pytest.mark.parametrize("rank", [2, 7])
def test_moments_are_carried_between_ranks(
    shape: tuple[int, int], proj_type: str, how: str, rank: int
) -> None:
    weight, made = galore(shape, moments=how, proj_type=proj_type)
    run(made, weight, range(5))
    old = copy.deepcopy(made.state[weight])
    made.param_groups[0]["rank"] = rank
    run(made, weight, range(5, 6))
    new, grad = made.state[weight], gradient(shape, 5)
    assert new["refreshed_at"] == 5
    assert float(new["step"]) == 6
    keys = [key for key in ("basis", "basis_right") if key in new]
    overlaps = [new[key].T @ old[key] for key in keys]
    left_only = len(keys) == 1 and new["side"] == 0
    left = overlaps[0] if len(keys) == 2 or left_only else None
    right = overlaps[-1] if len(keys) == 2 or not left_only else None
    low = grad if left is None else new[keys[0]].T @ grad
    low = low if right is None else low @ new[keys[-1]]
    m, v = expected_moments(how, old["exp_avg"], old["exp_avg_sq"], left, right, 5)
    torch.testing.assert_close(new["exp_avg"], BETAS[0] * m + (1 - BETAS[0]) * low)
    torch.testing.assert_close(
        new["exp_avg_sq"], BETAS[1] * v + (1 - BETAS[1]) * low.square(), rtol=1e-6, atol=1e-14
    )


def test_moments_in_eight_bits_are_carried_between_ranks() -> None:
    results = []
    for cls, keywords in ((GaLoreAdamW8bit, {"min_8bit_size": 0}), (GaLoreAdamW, {})):
        weight = nn.Parameter((0.2 * matrix(40, 64, 0)).float())
        group = {"params": [weight], "rank": 16, "scale": 0.5, "moments": "restore"}
        made = cls([group], lr=0.02, weight_decay=0.0, **keywords)
        run(made, weight, range(5))
        made.param_groups[0]["rank"] = 24
        before = weight.detach().clone()
        run(made, weight, range(5, 8))
        results.append(weight.detach() - before)
    assert made.state[weight]["exp_avg"].shape == (24, 64)
    assert (results[0] - results[1]).norm() < 0.15 * results[1].norm()


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("rank", [2, 7])
def test_factored_moments_are_carried_between_ranks(beta1: float | None, rank: int) -> None:
    weight, made = galore((9, 14), GaLoreAdafactor, {"beta1": beta1}, moments="restore")
    run(made, weight, range(5))
    old = copy.deepcopy(made.state[weight])
    made.param_groups[0]["rank"] = rank
    run(made, weight, range(5, 6))
    new = made.state[weight]
    low = new["basis"].T @ gradient((9, 14), 5)
    decay = 1 - 6**-0.8
    columns = decay * old["exp_avg_sq_col"] + (1 - decay) * (low.square() + 1e-30).mean(0)
    torch.testing.assert_close(new["exp_avg_sq_col"], columns, rtol=1e-5, atol=0)
    shares = (new["basis"].T @ old["basis"]).square()
    rows = shares @ old["exp_avg_sq_row"] + (1 - shares.sum(1)) * old["exp_avg_sq_row"].mean()
    rows = decay * rows + (1 - decay) * (low.square() + 1e-30).mean(1)
    torch.testing.assert_close(new["exp_avg_sq_row"], rows, rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", [GaLoreMuon, OnlineSubspaceLion])
def test_a_single_moment_is_carried_between_ranks(optimizer: type[LowRankOptimizer]) -> None:
    weight, made = galore((9, 14), optimizer, moments="restore")
    run(made, weight, range(4))
    key = "momentum_buffer" if optimizer is GaLoreMuon else "exp_avg"
    old = copy.deepcopy(made.state[weight])
    made.param_groups[0]["rank"] = 6
    weight.grad = torch.zeros_like(weight) + 1e-30  # all but nothing joins the moment
    made.step()
    new = made.state[weight]
    moved = new["basis"].T @ old["basis"] @ old[key] if new["refreshed_at"] == 4 else None
    assert moved is not None
    size = float(new[key].norm() / moved.norm())
    torch.testing.assert_close(new[key], size * moved, rtol=1e-6, atol=1e-12)
    assert 0.9 < size <= 1.0


def test_heads_carry_their_moments_between_ranks() -> None:
    options = {"projector": "cross_head", "heads": 3, "fit_on": "all", "moments": "restore"}
    weight, made = galore((12, 10), GaLorePlusAdamW, rank=9, **options)
    run(made, weight, range(3))
    old = copy.deepcopy(made.state[weight])
    made.param_groups[0]["rank"] = 6
    run(made, weight, range(3, 4))
    new, grad = made.state[weight], gradient((12, 10), 3)
    turn = torch.kron(torch.eye(3, dtype=torch.float64), new["basis"].T @ old["basis"])
    low = torch.block_diag(*[new["basis"]] * 3).T @ grad
    torch.testing.assert_close(new["exp_avg"], 0.9 * turn @ old["exp_avg"] + 0.1 * low)


def test_convolutions_carry_their_moments_between_ranks() -> None:
    weight = nn.Parameter((0.1 * matrix(12, 10 * 9, 0)).reshape(12, 10, 3, 3))
    group = {"params": [weight], "rank_ratio_cnn": 4.0, "moments": "restore"}
    made = CoapAdamW([group], lr=0.01)
    for step in range(4):
        if step == 3:
            old = copy.deepcopy(made.state[weight])
            made.param_groups[0]["rank_ratio_cnn"] = 9.0
        weight.grad = gradient((12, 90), step).reshape(12, 10, 3, 3)
        made.step()
    new = made.state[weight]
    assert new["exp_avg"].shape == (4, 3, 3, 3)
    turns = [new[key].T @ old[key] for key in ("basis", "basis_right")]
    moved = torch.einsum("ai,bj,ijkl->abkl", *turns, old["exp_avg"])
    low = torch.einsum("mi,nj,mnkl->ijkl", new["basis"], new["basis_right"], weight.grad)
    torch.testing.assert_close(new["exp_avg"], 0.9 * moved + 0.1 * low)


def test_without_a_gradient_moments_start_anew() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4, moments="restore", update_proj_gap=50)
    train(model, optimizer, range(4))
    optimizer.param_groups[0]["rank"] = 6
    set_gradients(model, 4)
    idle, zero, other = optimizer.param_groups[0]["params"]
    idle.grad = None
    zero.grad.zero_()
    optimizer.step()
    state = optimizer.state
    assert [float(state[p]["step"]) for p in (idle, zero, other)] == [0.0, 1.0, 5.0]
    assert not state[idle]["exp_avg"].any()
    train(model, optimizer, range(5, 6))
    assert [state[p]["refreshed_at"] for p in (idle, zero, other)] == [0, 1, 4]
