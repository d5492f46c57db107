"""Fits and r x r products are fp32 when the user lets products be TF32 or bf16; projections follow.

A CPU has no TF32, so these tests look at the settings that products are made under.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import matrix
from torch import nn

from lowrank.optimizers import (
    CoapAdamW,
    FiraAdamW,
    FloraAdafactor,
    GaLoreAdamW,
    OnlineSubspaceAdamW,
)
from lowrank.optimizers.engine.fp32 import exact_fp32
from lowrank.optimizers.projectors import apply, decompositions, online
from lowrank.optimizers.projectors.base import Projector
from lowrank.optimizers.rules import flora

CUDA: Any = torch.backends.cuda.matmul
ONEDNN: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"  # type: ignore[assignment]
    CUDA.fp32_precision = ONEDNN.fp32_precision = "none"


def settings() -> tuple[str, str]:
    return CUDA.fp32_precision, ONEDNN.fp32_precision


EXACT = ("ieee", "ieee")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_older_settings_come_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = settings()
    with warnings.catch_warnings(), exact_fp32():
        warnings.simplefilter("error")
        assert settings() == EXACT
    assert settings() == before != EXACT
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32


def test_newer_settings_come_back() -> None:
    CUDA.fp32_precision, ONEDNN.fp32_precision = "tf32", "bf16"
    with exact_fp32():
        assert settings() == EXACT
        with exact_fp32():
            assert settings() == EXACT
        assert settings() == EXACT
    assert settings() == ("tf32", "bf16")


def test_a_general_setting_still_reaches_products_afterwards() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[assignment]
    assert settings() == ("tf32", "tf32")
    with exact_fp32():
        assert settings() == EXACT
    assert settings() == ("tf32", "tf32")
    torch.backends.fp32_precision = "ieee"  # type: ignore[assignment]
    assert settings() == EXACT


def test_exact_settings_are_left_alone() -> None:
    before = settings()
    with exact_fp32():
        assert settings() == before
    assert settings() == before


def test_it_comes_back_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")

    def fail() -> None:
        with exact_fp32():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings() == ("tf32", "tf32")


def test_regions_of_several_threads_overlap() -> None:
    """The first region ends while another thread's is open, which stays exact; then all is back."""
    torch.set_float32_matmul_precision("high")
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with exact_fp32():
            inside.set()
            leave.wait(10)
            seen.append(settings())

    thread = threading.Thread(target=other)
    with exact_fp32():
        thread.start()
        assert inside.wait(10)
    leave.set()
    thread.join()
    assert seen == [EXACT]
    assert settings() == ("tf32", "tf32")


def spied(where: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The settings at each call of a function."""
    seen: list[tuple[str, str]] = []
    original: Callable[..., Any] = getattr(where, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(settings())
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, spy)
    return seen


def train(kind: type[torch.optim.Optimizer], steps: int = 5, **options: Any) -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    made = kind([{"params": [weight], "rank": 4, "update_proj_gap": 2, **options}], lr=1e-2)
    for k in range(steps):
        weight.grad = (matrix(24, 40, 1) + matrix(24, 40, k + 2)).float()
        made.step()


@pytest.mark.parametrize("mode", ["svd", "eigh", "randomized", "warm"])
def test_fits_are_exact_and_projections_are_the_users(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("high")
    fits = spied(decompositions, "svd", monkeypatch) if mode == "svd" else None
    if fits is None:
        fits = spied(decompositions, "Operand", monkeypatch)
    moves = spied(Projector, "rotation", monkeypatch)
    projections = spied(apply, "project", monkeypatch)
    writes = spied(apply, "write_back", monkeypatch)
    train(GaLoreAdamW, refresh=mode, moments="rotate")
    assert len(fits) == 3
    assert len(moves) == 2
    assert set(fits) == set(moves) == {EXACT}
    assert len(projections) == len(writes) == 5
    assert set(projections) == set(writes) == {("tf32", "tf32")}
    assert settings() == ("tf32", "tf32")


def test_moves_of_coap_and_online_bases_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    steps = spied(Projector, "store", monkeypatch)
    train(CoapAdamW)
    assert len(steps) == 3
    gradients = spied(online.OnlineProjector, "gradient", monkeypatch)
    train(OnlineSubspaceAdamW)
    assert len(gradients) == 4
    assert set(steps) == set(gradients) == {EXACT}


def test_norms_that_take_a_product_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    products = spied(Projector, "rotation", monkeypatch)
    direct = spied(Projector, "outside", monkeypatch)
    train(FiraAdamW, basis="int8")  # not orthonormal, so that the norm takes P^T P
    assert products
    train(FiraAdamW, rank=24, residual_scale=1.0)  # nothing is outside: the norm is taken directly
    assert direct
    assert set(products) == set(direct) == {EXACT}


def test_moves_of_floras_moment_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    entered = []

    def spy() -> Any:
        entered.append(1)
        return exact_fp32()

    monkeypatch.setattr(flora, "exact_fp32", spy)
    train(FloraAdafactor, steps=6, update_proj_gap=3)
    assert len(entered) == 2


def test_a_failed_fit_restores_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decompositions, "eigh", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(GaLoreAdamW)
    assert settings() == ("tf32", "tf32")


def test_hooks_run_under_the_users_setting() -> None:
    torch.set_float32_matmul_precision("high")
    weight = nn.Parameter(torch.zeros(24, 40))
    made = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-2)
    seen = []
    made.register_refresh_hook(lambda _: seen.append(settings()))
    weight.grad = matrix(24, 40, 1).float()
    made.step()
    assert seen == [("tf32", "tf32")]
