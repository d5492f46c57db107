"""Options that a loaded state changes are told; options switched in mid-training; bad values."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model
from table import TABLE, Row, identifier, train

from lowrank.optimizers import AdamW, LowRankOptimizer, build
from lowrank.optimizers.engine.sharding import Part
from lowrank.optimizers.rules.folded import FoldedAdam

#: Options that change updates: the method, what is saved, and what it is loaded into.
CHANGED: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("foam_adamw", {"fold_level": 2}, {"fold_level": 1}),
    ("foam_adamw", {"scale": 0.25}, {"scale": 0.5}),
    ("foam_adamw", {"fold": "mean"}, {"fold": "haar"}),
    ("scale_sgd", {"momentum": 0.9}, {"momentum": 0.5}),
    ("muon", {"momentum": 0.95}, {"momentum": 0.9}),
    ("adamw", {"betas": (0.9, 0.999)}, {"betas": (0.9, 0.95)}),
    ("galore_adamw", {"weight_decay": 0.0}, {"weight_decay": 0.1}),
    ("galore_adamw", {"eps": 1e-6}, {"eps": 1e-8}),
    ("racs_adamw", {"racs_beta": 0.9}, {"racs_beta": 0.8}),
    ("lora_pre_adamw", {"betas": (0.9, 0.95)}, {"betas": (0.8, 0.95)}),
    ("adafactor", {"clip_threshold": 1.0}, {"clip_threshold": 2.0}),
    ("adamw", {"maximize": False}, {"maximize": True}),
)


def stepped(name: str, **options: Any) -> LowRankOptimizer:
    model = tiny_model()
    optimizer = build(name, model, **options)
    set_gradients(model, 0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("name", "saved", "here"), CHANGED)
def test_an_option_that_loading_changes_is_told(
    name: str, saved: dict[str, Any], here: dict[str, Any]
) -> None:
    second = build(name, tiny_model(), **here)
    ((option, value),) = saved.items()
    with pytest.warns(UserWarning, match=f"{option}=.*here {option}=") as seen:
        second.load_state_dict(stepped(name, **saved).state_dict())
    assert len(seen) == 1
    assert value in [group[option] for group in second.param_groups]


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ({"lr": 1e-3}, {"lr": 2e-3}),
        ({"foreach": None}, {"foreach": False}),
        ({"fused": None}, {"fused": False}),
        ({"betas": (0.9, 0.999)}, {"betas": [0.9, 0.999]}),
        ({"weight_decay": 0}, {"weight_decay": 0.0}),
    ],
)
def test_what_changes_no_update_is_not_told(saved: dict[str, Any], here: dict[str, Any]) -> None:
    state = stepped("adamw", **saved).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("adamw", tiny_model(), **here).load_state_dict(state)


def test_a_cycled_momentum_is_not_told() -> None:
    def scheduled() -> tuple[LowRankOptimizer, Any]:
        optimizer = stepped("adamw")
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return optimizer, cycle

    first, cycle = scheduled()
    for _ in range(3):
        first.step()
        cycle.step()
    second, _ = scheduled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("row", TABLE, ids=identifier)
def test_equal_options_load_without_a_word(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row.build(tiny_model()).load_state_dict(optimizer.state_dict())


def test_momentum_switched_in_mid_training() -> None:
    model = tiny_model()
    optimizer = build("scale_sgd", model, lr=1e-3)
    hidden = optimizer.param_groups[0]
    train(model, optimizer, range(3))
    assert all("momentum_buffer" not in optimizer.state[param] for param in hidden["params"])
    hidden["momentum"] = 0.9
    train(model, optimizer, range(3, 6))
    assert all(optimizer.state[param]["momentum_buffer"].any() for param in hidden["params"])
    again = build("scale_sgd", tiny_model(), lr=1e-3)
    with pytest.warns(UserWarning, match="momentum=0.9"):
        again.load_state_dict(optimizer.state_dict())
    hidden["momentum"] = 0.0
    train(model, optimizer, range(6, 8))
    assert all("momentum_buffer" not in optimizer.state[param] for param in hidden["params"])
    assert all(param.isfinite().all() for param in model.parameters())


def test_momentum_switched_on_is_that_of_a_new_optimizer() -> None:
    """It starts at zero, whatever steps were taken before."""
    switched, fresh = tiny_model(), tiny_model()
    first = build("scale_sgd", switched, lr=1e-3)
    train(switched, first, range(3))
    fresh.load_state_dict(switched.state_dict())
    second = build("scale_sgd", fresh, lr=1e-3)
    first.param_groups[0]["momentum"] = second.param_groups[0]["momentum"] = 0.9
    train(switched, first, range(3, 6))
    train(fresh, second, range(3, 6))
    for param, other in zip(
        first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(param, other)


@pytest.mark.parametrize("name", ["galore_adamw", "relora_adamw", "scale_sgd", "foam_adamw"])
def test_patterns_of_a_wrong_kind(name: str) -> None:
    for value in (5, True, b"attn", {"attn": 1}):
        with pytest.raises(ValueError, match=r"patterns=.*: accepted are"):
            build(name, tiny_model(), patterns=value)


@pytest.mark.parametrize("name", ["galore_adamw", "ldadam_adamw", "alice_adamw", "relora_adamw"])
def test_betas_of_a_wrong_kind(name: str) -> None:
    for betas in (0.9, "ab", [0.9], None, (0.9, 1.0)):
        with pytest.raises(ValueError, match=r"betas.*: accepted (are|is)"):
            build(name, tiny_model(), betas=betas)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("update_proj_gap", -1), ("projector", "nothing"), ("scale", float("nan"))],
)
@pytest.mark.parametrize("name", ["adamw", "foam_adamw", "muon"])
def test_options_without_effect_are_checked_all_the_same(
    name: str, option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r}: accepted"):
        build(name, tiny_model(), **{option: value})


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        ("adamw", {"rank": 4, "scale": 0.5}),
        ("foam_adamw", {"update_proj_gap": 7}),
        ("muon", {"projector": "random"}),
        ("racs_adamw", {"proj_type": "left"}),
        ("sltrain_adamw", {"update_proj_gap": 7}),
    ],
)
def test_options_without_effect_are_named(name: str, idle: dict[str, Any]) -> None:
    said = f"{name}: {', '.join(f'{key}={value!r}' for key, value in idle.items())} has no effect"
    with pytest.warns(UserWarning, match=re.escape(said)) as seen:
        build(name, tiny_model(), **idle)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("row", TABLE, ids=identifier)
def test_options_with_effect_are_not(row: Row) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row.build(tiny_model(), plain_lr=1e-3, seed=1)


def test_parts_that_cut_blocks_say_which_level_fits() -> None:
    processes: Any = SimpleNamespace(world=2)
    part = Part((12, 5), 0, 0, 6, processes, (6, 6), 60, transposed=True)
    with pytest.raises(ValueError, match="accepted are fold_level of at most 1, or parameters spr"):
        FoldedAdam(lr=1e-3, level=2).check_part(part, "mlp.weight")
    FoldedAdam(lr=1e-3, level=1).check_part(part, "mlp.weight")
    FoldedAdam(lr=1e-3, level=2).check_part(replace(part, transposed=False), "mlp.weight")


def test_a_state_saved_right_after_loading_is_the_loaded_one() -> None:
    state = stepped("galore_adamw", rank=4).state_dict()
    second = build("galore_adamw", tiny_model(), rank=4)
    second.load_state_dict(state)
    assert second.state_dict()["param_groups"] == state["param_groups"]


def test_the_same_parameters_in_another_order_are_refused() -> None:
    """Same shapes: their moments would change places without a word."""

    def named(*order: str) -> LowRankOptimizer:
        return AdamW([(name, torch.nn.Parameter(torch.ones(3, 2))) for name in order], lr=0.1)

    saved = named("first", "second").state_dict()
    with pytest.raises(ValueError, match="has first where this optimizer has second, and states"):
        named("second", "first").load_state_dict(saved)
    named("module.second", "module.first").load_state_dict(saved)
