"""Defaults that depend on the device: shown in the groups, saved with them, kept elsewhere."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support import matrix
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.optimizers import CoapAdamW, FloraAdafactor, GaLoreAdamW, LowRankOptimizer
from lowrank.trainers.plan.driverless import driverless
from lowrank.trainers.plan.fakes import faking


def made(
    cls: type[LowRankOptimizer] = GaLoreAdamW, device: str = "cpu", **options: Any
) -> LowRankOptimizer:
    params = [nn.Parameter(torch.empty(12, 8, device=device)) for _ in range(2)]
    for index, param in enumerate(params if device == "cpu" else ()):
        param.data.copy_(matrix(12, 8, index))
    plain = nn.Parameter(torch.empty(8, device=device))
    return cls([{"params": params, "rank": 2, **options}, {"params": [plain]}], lr=1e-2)


def chosen(optimizer: LowRankOptimizer) -> tuple[Any, Any]:
    group = optimizer.param_groups[0]
    return group["refresh"], group["stagger"]


def on_cuda(cls: type[LowRankOptimizer] = GaLoreAdamW, **options: Any) -> tuple[Any, Any]:
    with faking(FakeTensorMode()), driverless(torch.device("cuda")):
        return chosen(made(cls, "cuda", **options))


def step(optimizer: LowRankOptimizer, number: int) -> None:
    for index, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = matrix(12, 8, 10 * number + index).float()
    optimizer.step()


def test_a_cpu_has_exact_bases_all_at_once() -> None:
    assert chosen(made()) == ("eigh", False)
    assert chosen(made(refresh=None, stagger=None)) == ("eigh", False)
    assert chosen(made(refresh="warm", stagger=True)) == ("warm", True)


def test_a_gpu_has_randomized_ones_spread_over_long_gaps() -> None:
    assert on_cuda() == ("randomized", True)
    assert on_cuda(CoapAdamW, update_proj_gap=200) == ("randomized", True)
    assert on_cuda(update_proj_gap=50) == ("randomized", True)
    assert on_cuda(update_proj_gap=49) == ("randomized", False)
    assert on_cuda(refresh="svd", stagger=False) == ("svd", False)
    assert on_cuda(FloraAdafactor)[1] is False


def test_a_loaded_state_goes_on_with_what_it_was_saved_with() -> None:
    source = made(refresh="randomized", stagger=True)  # as made on a GPU
    step(source, 0)
    saved = copy.deepcopy(source.state_dict())
    assert saved["param_groups"][0]["refresh"] == "randomized"
    ours = made()
    with pytest.warns(UserWarning, match=r"refresh='randomized' \(here refresh='eigh'\), stagger"):
        ours.load_state_dict(saved)
    assert chosen(ours) == ("randomized", True)
    step(ours, 1)
    assert chosen(ours) == ("randomized", True)


def test_a_state_from_before_goes_on_as_before() -> None:
    source = made()
    step(source, 0)
    saved = copy.deepcopy(source.state_dict())
    for name in ("refresh", "stagger"):
        for group in saved["param_groups"]:
            del group[name]
    ours = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(saved)
    step(ours, 1)
    assert chosen(ours) == ("eigh", False)


def test_none_in_a_group_decides_anew() -> None:
    optimizer = made(refresh="randomized", stagger=True)
    step(optimizer, 0)
    optimizer.param_groups[0].update(refresh=None, stagger=None)
    step(optimizer, 1)
    assert chosen(optimizer) == ("eigh", False)
