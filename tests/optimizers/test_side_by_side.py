"""Ours beside galore-torch and fira, where these are installed (`./scripts/test --all` does)."""

from __future__ import annotations

from typing import Any

import pytest
from side_by_side import GAP, SHAPES, assert_side_by_side, needs, official

from lowrank.optimizers import FiraAdamW, GaLoreAdafactor, GaLoreAdamW


@needs("galore_torch")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adafactor_beta1", "adafactor_scaled"])
def test_galore_torch(shape: tuple[int, int], proj_type: str, kind: str) -> None:
    package = official("galore_torch")
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05}
    ours, theirs = GaLoreAdamW, package.GaLoreAdamW
    if kind != "adamw":
        ours, theirs = GaLoreAdafactor, package.GaLoreAdafactor
        options |= {"relative_step": False, "scale_parameter": kind == "adafactor_scaled"}
        options["beta1"] = 0.9 if kind == "adafactor_beta1" else None
    group = {"rank": 5, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    assert_side_by_side(ours, theirs, shape, group, options)


@needs("fira")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_fira(shape: tuple[int, int], proj_type: str, alpha: float, weight_decay: float) -> None:
    group = {"rank": 5, "update_proj_gap": GAP, "alpha": alpha, "proj_type": proj_type}
    options = {"lr": 0.01, "weight_decay": weight_decay}
    assert_side_by_side(FiraAdamW, official("fira").FiraAdamW, shape, group, options)
