"""Uses that trained something else than was asked for, without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_model
from torch import nn

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
