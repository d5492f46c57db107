"""Uses that trained something else than was asked for, without a word."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import tiny_model
from torch import nn

from lowrank import optimizers
from lowrank.optimizers import (
    LowRankAdamW,
    LowRankOptimizer,
    ReLoRAAdamW,
    SLTrainAdamW,
    SLTrainAdamW8bit,
    build,
    convert,
)


@pytest.mark.parametrize("name", ["muon", "galore_adamw", "relora_adamw"])
def test_a_model_without_hidden_matrices_raises(name: str) -> None:
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"no nn\.Linear of Sequential is in a list of blocks"):
        build(name, plain)
    model = tiny_model().requires_grad_(requires_grad=False)
    model.lm_head.requires_grad_()
    with pytest.raises(ValueError, match="is frozen, 3 of them"):
        build(name, model)


def test_muon_says_what_it_leaves_to_adamw() -> None:
    with pytest.warns(UserWarning, match="hidden layers are under Muon; the largest that are not"):
        build("muon", tiny_model(), patterns="q_proj")


def test_momentum_of_muon_and_one_cycle() -> None:
    optimizer = build("muon", tiny_model())
    assert "OneCycleLR" in (type(optimizer).__doc__ or "")


@pytest.mark.parametrize("kind", [LowRankAdamW, SLTrainAdamW, SLTrainAdamW8bit, ReLoRAAdamW])
def test_classes_for_factors_on_a_dense_model_warn(kind: type[LowRankOptimizer]) -> None:
    with pytest.warns(UserWarning, match="no parameter group has factors=True") as seen:
        kind(tiny_model().parameters())
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "option", "first", "second"),
    [
        ("relora_adamw", "rank", 4, 8),
        ("sltrain_adamw", "rank", 4, 8),
        ("sltrain_adamw", "density", 0.1, 0.2),
        ("switchlora_adamw", "rank", 4, 2),
        ("sst_adamw", "rank", 4, 2),
        ("loqt_adamw", "rank", 4, 2),
    ],
)
def test_other_options_for_a_converted_model_raise(
    name: str, option: str, first: Any, second: Any
) -> None:
    model = convert(name, tiny_model(), **{"rank": 4, option: first})
    parts = {key: value.clone() for key, value in model.state_dict().items()}
    for make in (build, convert):
        with pytest.raises(ValueError, match=f"{option}={second} for a model that is converted"):
            make(name, model, **{option: second})
    assert all(torch.equal(parts[key], value) for key, value in model.state_dict().items())
    build(name, model, **{option: first})
    build(name, model)


def test_a_rank_above_a_side_is_the_clamped_one() -> None:
    model = convert("relora_adamw", tiny_model(), rank=64)
    build("relora_adamw", model, rank=64)
    build("relora_adamw", model, rank=128)


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_state_for_a_converted_model_says_what_to_do(strict: bool) -> None:
    model = convert("relora_adamw", tiny_model(), rank=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"q_proj is dense in this state dict, and here a .*\n"):
        model.load_state_dict(tiny_model(seed=1).state_dict(), strict=strict)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if "self_attn" in key)


def test_every_8bit_class_accepts_amsgrad_off() -> None:
    for name, kind in vars(optimizers).items():
        if name.endswith("AdamW8bit") and isinstance(kind, type):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind(tiny_model().parameters(), amsgrad=False)
