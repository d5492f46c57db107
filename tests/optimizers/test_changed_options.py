"""What an option that is changed in the middle of training does to the state."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from support import matrix, set_gradients, tiny_model
from table import TABLE, train
from torch import Tensor, nn

from lowrank.optimizers import (
    CoapAdamW,
    FloraAdafactor,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreMuon,
    GaLorePlusAdamW,
    LowRankOptimizer,
    OnlineSubspaceAdamW,
    OnlineSubspaceLion,
    QGaLoreAdamW8bit,
    build,
)

BETAS = (0.9, 0.999)
SHAPES = ((14, 9), (9, 14))


def gradient(shape: tuple[int, int], step: int) -> Tensor:
    return 1e-2 * (0.4 * matrix(*shape, 1) + matrix(*shape, step + 2))


def run(made: LowRankOptimizer, weight: nn.Parameter, steps: range) -> None:
    for step in steps:
        weight.grad = gradient(tuple(weight.shape), step).to(weight.dtype)
        made.step()


def galore(
    shape: tuple[int, int], optimizer: Any = GaLoreAdamW, keywords: Any = None, **options: Any
) -> tuple[nn.Parameter, LowRankOptimizer]:
    weight = nn.Parameter(0.2 * matrix(*shape, 0))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 100, "scale": 0.5, **options}
    return weight, optimizer([group], lr=0.02, **{"refresh": "svd", **(keywords or {})})


def row_named(name: str) -> Any:
    return next(row for row in TABLE if row.name == name)


# Sizes


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


# Other parts of the state


def test_zeroed_moments_go_on_counting_steps() -> None:
    weight, made = galore((9, 14), moments="reset")
    run(made, weight, range(5))
    made.param_groups[0]["rank"] = 6
    before = weight.detach().clone()
    run(made, weight, range(5, 6))
    state, grad = made.state[weight], gradient((9, 14), 5)
    assert (state["refreshed_at"], float(state["step"])) == (5, 6.0)
    low = state["basis"].T @ grad
    torch.testing.assert_close(state["exp_avg"], 0.1 * low)
    size = 0.02 * (1 - BETAS[1]) ** 0.5 / (1 - BETAS[0])
    step = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6)
    torch.testing.assert_close(before - weight, 0.5 * size * state["basis"] @ step)


def test_bias_corrections_when_resets_begin_or_end() -> None:
    weight, made = galore((9, 14), moments="reset", update_proj_gap=4)
    run(made, weight, range(6))  # refreshed at 4, so the moments have seen two steps
    old = copy.deepcopy(made.state[weight])
    made.param_groups[0]["moments"] = "keep"
    made.param_groups[0]["update_proj_gap"] = 100
    before = weight.detach().clone()
    run(made, weight, range(6, 7))
    state = made.state[weight]
    assert (state["refreshed_at"], float(state["step"])) == (0, 3.0)
    assert torch.equal(state["basis"], old["basis"])
    size = 0.02 * (1 - BETAS[1] ** 3) ** 0.5 / (1 - BETAS[0] ** 3)
    step = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6)
    torch.testing.assert_close(before - weight, 0.5 * size * state["basis"] @ step)
    made.param_groups[0]["moments"] = "reset"
    run(made, weight, range(7, 8))
    assert made.state[weight]["refreshed_at"] == 3  # at once, so that counts agree
    torch.testing.assert_close(
        made.state[weight]["exp_avg"], 0.1 * made.state[weight]["basis"].T @ gradient((9, 14), 7)
    )


@pytest.mark.parametrize("changed", [{"basis": "int8"}, {"projector": "random"}], ids=str)
def test_kept_moments_stay_where_their_shape_does(changed: dict[str, Any]) -> None:
    weight, made = galore((9, 14))
    run(made, weight, range(4))
    old = copy.deepcopy(made.state[weight])
    made.param_groups[0].update(changed)
    run(made, weight, range(4, 5))
    state = made.state[weight]
    assert (state["refreshed_at"], float(state["step"])) == (4, 5.0)
    joined = state["exp_avg"] - 0.9 * old["exp_avg"]
    assert 0 < joined.norm() < 0.5 * gradient((9, 14), 4).norm()


def test_what_a_change_leaves_as_it_is_is_not_refitted() -> None:
    weight, made = galore((9, 14), residual="norm_scaled")
    run(made, weight, range(4))
    basis = made.state[weight]["basis"].clone()
    for changed in (
        {"refresh": "eigh"},
        {"scale": 0.1},
        {"residual": "dropped"},
        {"schedule": "lazy"},
        {"seed": 3},
        {"update_proj_gap": 60},
    ):
        made.param_groups[0].update(changed)
        run(made, weight, range(5, 6))
        state = made.state[weight]
        assert torch.equal(state["basis"], basis)
    assert "residual_norm" not in state
    assert state["gap"] == 60
    assert (state["refreshed_at"], float(state["step"])) == (0, 10.0)
    assert "limiter" not in made.param_groups[0]  # the former residual's option


def test_a_limit_on_growth_starts_anew_with_another_residual() -> None:
    """The norm that one residual keeps is no measure of another's."""
    weight, made = galore((9, 14), residual="norm_scaled")
    run(made, weight, range(4))
    made.param_groups[0]["residual"] = "scaled"
    before = weight.detach().clone()
    run(made, weight, range(4, 5))
    limited = (weight - before).norm()
    other, free = galore((9, 14), residual="norm_scaled")
    run(free, other, range(4))
    free.param_groups[0].update(residual="scaled", limiter=None)
    before = other.detach().clone()
    run(free, other, range(4, 5))
    torch.testing.assert_close(limited, (other - before).norm())


def test_another_gap_scales_the_gaps_of_a_lazy_schedule() -> None:
    weight = nn.Parameter((0.2 * matrix(9, 14, 0)).float())
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "cos_threshold": -1.0}
    made = QGaLoreAdamW8bit([group], lr=0.02, queue_size=1)
    run(made, weight, range(5))
    grown = made.state[weight]["gap"]
    assert grown > 2
    made.param_groups[0]["update_proj_gap"] = 6
    run(made, weight, range(5, 6))
    assert made.state[weight]["gap"] == 3 * grown


def test_seeds_of_drawn_bases_change_as_at_a_refresh() -> None:
    model = tiny_model()
    optimizer = build("apollo_adamw", model, rank=4, update_proj_gap=100, moments="restore")
    train(model, optimizer, range(3))
    param = optimizer.param_groups[0]["params"][0]
    old = copy.deepcopy(optimizer.state[param])
    optimizer.param_groups[0]["seed"] = 9
    train(model, optimizer, range(3, 4))
    state = optimizer.state[param]
    assert state["refreshed_at"] == 3
    assert not torch.equal(state["exp_avg"], old["exp_avg"])
    assert float(state["step"]) == 4


@pytest.mark.parametrize(
    "changed", [{"update_proj_gap": 7}, {"rank": 6}, {"seed": 4}, {"proj_type": "right"}], ids=str
)
def test_flora_moves_its_moment_to_the_bases_of_other_options(changed: dict[str, Any]) -> None:
    weight = nn.Parameter(0.2 * matrix(9, 14, 0))
    group = {"params": [weight], "rank": 4, "kappa": 3, "scale": 1.0}
    made = FloraAdafactor([group], lr=1e-9, scale_parameter=False, beta1=1 - 1e-9)
    run(made, weight, range(4))
    rule, state = made.compose(made.param_groups[0]).rule, made.state[weight]
    state["exp_avg"].normal_()
    geometry = rule._geometry((9, 14))
    whole = rule.basis(state, geometry, 4 // 3, state["exp_avg"]) @ state["exp_avg"]
    made.param_groups[0].update(changed)
    run(made, weight, range(4, 5))
    rule, state = made.compose(made.param_groups[0]).rule, made.state[weight]
    geometry = rule._geometry((9, 14))
    basis = rule.basis(state, geometry, 5 // rule.options.update_proj_gap, state["exp_avg"])
    moved = whole @ basis if changed.get("proj_type") else basis.T @ whole
    torch.testing.assert_close(state["exp_avg"], moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["relora_adamw", "sst_adamw", "low_rank_adamw", "loqt_adamw"])
def test_another_gap_of_events_counts_from_its_next_multiple(name: str) -> None:
    row, model = row_named(name), tiny_model()
    key = "refactor_gap" if name == "low_rank_adamw" else "update_proj_gap"
    options = {"gap_growth": 0.0} if name == "loqt_adamw" else {}
    optimizer = row.build(model, **{key: 2, **options})
    events: list[int] = []
    optimizer.register_event_hook(lambda event: events.append(event.step))
    train(model, optimizer, range(9))
    events.clear()
    optimizer.param_groups[0][key] = 5
    train(model, optimizer, range(9, 20))
    assert sorted(set(events)) == ([11, 16] if name == "loqt_adamw" else [10, 15, 20])


def test_online_bases_take_another_rank() -> None:
    weight, made = galore((9, 14), OnlineSubspaceAdamW)
    run(made, weight, range(3))
    made.param_groups[0]["rank"] = 6
    run(made, weight, range(3, 5))
    state = made.state[weight]
    assert state["basis"].shape == state["basis_exp_avg"].shape == (9, 6)
    torch.testing.assert_close(
        state["basis"].T @ state["basis"], torch.eye(6, dtype=torch.float64), rtol=0, atol=0.1
    )


# Which changes are taken


def test_scalars_act_at_once() -> None:
    for key, value in (("lr", 0.05), ("betas", (0.5, 0.9)), ("eps", 1e-2), ("scale", 1.0)):
        weight, made = galore((9, 14))
        run(made, weight, range(4))
        other = copy.deepcopy(made)
        (twin,) = other.param_groups[0]["params"]
        made.param_groups[0][key] = value
        run(made, weight, range(4, 5))
        run(other, twin, range(4, 5))
        assert not torch.equal(weight, twin), key
        assert float(made.state[weight]["step"]) == 5


def test_a_list_that_is_changed_in_place_is_noticed() -> None:
    weight, made = galore((9, 14))
    made.param_groups[0]["betas"] = [0.9, 0.999]
    run(made, weight, range(2))
    made.param_groups[0]["betas"][:] = (0.5, 0.9)
    run(made, weight, range(2, 3))
    state = made.state[weight]
    moment = state["exp_avg"].clone()
    run(made, weight, range(3, 4))
    low = state["basis"].T @ weight.grad
    torch.testing.assert_close(state["exp_avg"], 0.5 * moment + 0.5 * low)


REFUSED = (
    ("galore_adamw", {"capturable": True}, "capturable=True, changed after construction"),
    ("galore_adamw", {"rank": 2.5}, "rank=2.5"),
    ("galore_adamw", {"lr": float("nan")}, "lr=nan"),
    ("galore_adamw", {"lr": None}, "lr=None"),
    ("galore_adamw", {"update_proj_gp": 3}, "update_proj_gap"),
    ("galore_adamw", {"limiter": 1.5}, "limiter=1.5: accepted with residual"),
    ("galore_adamw", {"foreach": True, "fused": True}, "foreach=True with fused=True"),
    ("galore_adamw", {"basis": "int8", "residual": "sign", "moments": "turn"}, "moments='turn'"),
    ("fira_adamw", {"alpha": 0.5}, "alpha=0.5 in a group after construction.*'scale'"),
    ("coap_adamw", {"update_interval": 5}, "update_interval=5.*'update_proj_gap'"),
    ("coap_adamw", {"restore_state": True}, "restore_state=True in a group after construction"),
    ("coap_adamw", {"projector": "singular"}, "reproject_factor=1: accepted with projector='coap'"),
    ("frugal_adamw", {"density": 0.5}, "density=0.5 in a group after construction"),
    ("relora_adamw", {"relora": 5}, "relora=5.*'update_proj_gap'"),
    ("relora_adamw", {"factors": False}, "factors=False, changed after construction"),
    ("muon", {"use_muon": "yes"}, "use_muon"),
)


@pytest.mark.parametrize(("name", "changed", "message"), REFUSED, ids=str)
def test_refused_changes_write_nothing(name: str, changed: dict[str, Any], message: str) -> None:
    row, model = row_named(name), tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(3))
    group = optimizer.param_groups[0]
    kept = {key: group[key] for key in changed if key in group}
    set_gradients(model, 3)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    group.update(changed)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for old, new in zip(before, (model.state_dict(), optimizer.state_dict()["state"]), strict=True):
        assert str(old) == str(new)
    for key in changed:
        group.pop(key, None)
    group.update(kept)
    optimizer.step()


def test_a_group_without_rank_is_projected_once_it_has_one() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train(model, optimizer, range(3))
    group = optimizer.param_groups[1]
    group["rank"] = 2
    train(model, optimizer, range(3, 5))
    assert all(optimizer.state[p]["basis"].shape == (16, 2) for p in group["params"])
    optimizer.param_groups[2]["rank"] = 2
    set_gradients(model, 5)
    with pytest.raises(ValueError, match=r"up_proj\.bias is 1-dimensional in a group with rank"):
        optimizer.step()


def test_a_parameter_may_change_its_group() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4, moments="restore")
    train(model, optimizer, range(3))
    first, second = optimizer.param_groups[:2]
    for key in ("params", "param_names"):
        second[key].append(first[key].pop())
    moved = second["params"][-1]
    train(model, optimizer, range(3, 5))
    assert "basis" not in optimizer.state[moved]
    assert float(optimizer.state[moved]["step"]) == 2
    for key in ("params", "param_names"):
        first[key].append(second[key].pop())
    train(model, optimizer, range(5, 6))
    assert "basis" in optimizer.state[moved]


def test_groups_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train(model, optimizer, range(1))
    composed: list[int] = []
    compose = GaLoreAdamW.compose

    def counting(self: GaLoreAdamW, group: dict[str, Any]) -> Any:
        composed.append(1)
        return compose(self, group)

    monkeypatch.setattr(GaLoreAdamW, "compose", counting)
    for step in range(1, 5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / step
        train(model, optimizer, range(step, step + 1))
    assert not composed
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    train(model, optimizer, range(5, 7))
    assert len(composed) == 1


# Between a change and the next step


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_a_change_that_waits_for_its_step_is_saved_with_its_state(how: str) -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4, moments="restore", update_proj_gap=50)
    train(model, optimizer, range(4))
    optimizer.param_groups[0].update(rank=6, basis="int8")
    if how == "state_dict":
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = tiny_model(seed=1)
        twin.load_state_dict(saved["model"])
        other = build("galore_adamw", twin)
        other.load_state_dict(saved["optimizer"])
        other.load_state_dict(copy.deepcopy(other.state_dict()))
    else:
        twin, other = copy.deepcopy(copy.deepcopy((model, optimizer)))
    assert other.param_groups[0].keys() == {*optimizer.param_groups[0]}
    train(model, optimizer, range(4, 7))
    train(twin, other, range(4, 7))
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].shape[1] == 6
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
