"""What an option that is changed in the middle of training does to the state."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from changed_options import BETAS, galore, gradient, row_named, run
from support import matrix, set_gradients, tiny_model
from table import train
from torch import nn

from lowrank.optimizers import (
    FloraAdafactor,
    GaLoreAdamW,
    OnlineSubspaceAdamW,
    QGaLoreAdamW8bit,
    build,
)

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


def test_moments_that_begin_anew_are_told() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, lr=1e-2, rank=4, plain_rule="adamw")
    train(model, optimizer, range(3))
    plain = [group for group in optimizer.param_groups if group.get("rank") is None]
    for group in plain:
        group["plain_rule"] = "adafactor"
    count = sum(len(group["params"]) for group in plain)
    with pytest.warns(UserWarning, match=rf"moments of {count} parameters .* begin anew"):
        train(model, optimizer, range(3, 4))
    assert {float(optimizer.state[p]["step"]) for g in plain for p in g["params"]} == {1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        train(model, optimizer, range(4, 6))


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
