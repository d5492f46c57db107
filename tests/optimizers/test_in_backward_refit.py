"""Bases that are fitted to the first gradient of an accumulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_backward_runs import Run, backward, batch, distance, loss_of, make, row_of, unexamined
from table import Row, assert_same, every
from torch import Tensor, nn

from lowrank.optimizers import RefreshEvent, build, update_in_backward
from lowrank.optimizers.engine.low_rank_gradients import examine

LR, RANK, GAP, SCALE, BETAS, EPS = 0.01, 3, 3, 0.25, (0.9, 0.999), 1e-6


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with unexamined():
        yield


# Against the rule


def gradients(step: int, parts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(8, 12, generator=generator, dtype=torch.float64) for _ in range(parts)]


def reference(steps: int, parts: int) -> Tensor:
    """GaLore with AdamW, its basis by the first of a step's gradients."""
    weight = torch.zeros(8, 12, dtype=torch.float64)
    first, second = torch.zeros(2, RANK, 12, dtype=torch.float64)
    for step in range(steps):
        grads = gradients(step, parts)
        if step % GAP == 0:
            basis = torch.linalg.svd(grads[0]).U[:, :RANK]
        projected = basis.T @ sum(grads)
        first = BETAS[0] * first + (1 - BETAS[0]) * projected
        second = BETAS[1] * second + (1 - BETAS[1]) * projected**2
        one, two = (1 - beta ** (step + 1) for beta in BETAS)
        direction = math.sqrt(two) / one * first / (second.sqrt() + EPS)
        weight = weight - LR * SCALE * basis @ direction
    return weight


class Matrix(nn.Module):
    """One projected weight, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(12, 8, bias=False, dtype=torch.float64)
        self.norm = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        nn.init.zeros_(self.mlp.weight)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, (1e9, "projected"), (1e9, "previous")])
def test_galore_of_the_first_gradient(parts: int, clip: tuple[float, Any] | None) -> None:
    model = Matrix()
    optimizer = build(
        "galore_adamw",
        model,
        lr=LR,
        rank=RANK,
        update_proj_gap=GAP,
        scale=SCALE,
        refresh="svd",
        stagger=False,
    )
    handle = update_in_backward(optimizer, parts, *(clip or (None,)), refit="first")
    assert "refit='first'" in repr(handle)
    for step in range(7):
        for part, grad in enumerate(gradients(step, parts)):
            ((model.mlp.weight * grad).sum() + model.norm.sum()).backward()
            assert model.mlp.weight.grad is None, (step, part)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.mlp.weight.detach(), reference(7, parts), rtol=0, atol=1e-12)


# Every method


@every
def test_equal_micro_batches_are_the_ordinary_loop(row: Row) -> None:
    """Where the first gradient has the directions of all of them, nothing differs."""
    runs = []
    for refit in ("first", "whole"):
        run = Run(row, 2, refit=refit)
        for step in range(5):
            for _ in range(2):
                (loss_of(run.model, batch(step, 0)) / 2).backward()
            run.end_step()
        runs.append(run)
    assert_same(runs[0].model, runs[1].model)


@every
def test_what_is_kept_in_the_first_step(row: Row) -> None:
    run = Run(row, 2, refit="first")
    backward(run.model, 0)
    known = examine(run.optimizer)
    assert run.handle is not None
    kept = set(run.handle._kept_for_step())
    for param in run.params:
        projected = isinstance(known[id(param)], int) and id(param) not in kept
        assert (param.grad is None) == projected or not param.requires_grad


@pytest.mark.parametrize("name", ["galore_adamw", "qgalore_adamw_8bit", "coap_adamw"])
def test_other_micro_batches_are_trained_by_too(name: str) -> None:
    row = row_of(name)
    runs = [Run(row, 3, refit=refit).steps(range(4)) for refit in ("first", "whole")]
    apart = distance(runs[0].model, runs[1].model)
    assert 1e-5 < apart < runs[1].moved


# Saving


@pytest.mark.parametrize("name", ["galore_adamw", "qgalore_adamw_8bit", "coap_adafactor_8bit"])
@pytest.mark.parametrize("refit", ["first", "whole"])
def test_resuming_in_a_step_with_new_bases(name: str, refit: str) -> None:
    own = Run(row_of(name), 3, refit="first").steps(range(2))
    backward_of(own, 2, 0)
    other = Run(row_of(name), 3, refit=refit)
    other.load(own.states())
    for run in (own, other):
        backward_of(run, 2, 1)
        backward_of(run, 2, 2)
        run.end_step()
    assert_same(own.model, other.model)


def backward_of(run: Run, step: int, part: int) -> None:
    (loss_of(run.model, batch(step, part)) / run.parts).backward()


# Fits that fail, and steps that are dropped


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_fit_that_fails_leaves_the_gradient_whole(value: float) -> None:
    model = Matrix()
    optimizer = build("galore_adamw", model, rank=RANK, update_proj_gap=GAP)
    events: list[RefreshEvent] = []
    optimizer.register_refresh_hook(events.append)
    update_in_backward(optimizer, 2, refit="first")
    good = gradients(0, 1)[0]
    for grad in (torch.full_like(good, value), good):
        ((model.mlp.weight * grad).sum() + model.norm.sum()).backward()
        assert (model.mlp.weight.grad is None) == (grad is good)
        assert len(events) == (1 if grad is good and value == 0.0 else 0)
    optimizer.step()
    assert bool((model.mlp.weight != 0).any()) == (value == 0.0)
    optimizer.zero_grad()
    for grad in gradients(1, 2):
        ((model.mlp.weight * grad).sum() + model.norm.sum()).backward()
        assert model.mlp.weight.grad is None
    assert len(events) == 1
    optimizer.step()
    assert bool((model.mlp.weight != 0).any())


def test_a_dropped_micro_batch_leaves_its_bases() -> None:
    model, optimizer = make()
    events: list[RefreshEvent] = []
    optimizer.register_refresh_hook(events.append)
    handle = update_in_backward(optimizer, 2, refit="first")
    backward(model, 0)
    fitted = len(events)
    assert fitted > 0
    optimizer.zero_grad()
    assert handle.kept_bytes == 0
    for part in range(2):
        (loss_of(model, batch(1, part)) / 2).backward()
    optimizer.step()
    assert len(events) == fitted


def test_a_matrix_that_comes_later_has_its_bases_then() -> None:
    model = Matrix()
    optimizer = build("galore_adamw", model, rank=RANK, update_proj_gap=GAP)
    update_in_backward(optimizer, 3, refit="first")
    model.norm.sum().backward()
    for grad in gradients(0, 2):
        ((model.mlp.weight * grad).sum() + model.norm.sum()).backward()
        assert model.mlp.weight.grad is None
    optimizer.step()
    assert bool((model.mlp.weight != 0).any())


def test_a_scaler_s_first_step_keeps_projections() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer, 1, math.inf, "projected", refit="first")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    other, plain = make()
    for step in range(4):
        scaler.scale(loss_of(model, batch(step, 0))).backward()
        whole = [n for n, param in model.named_parameters() if param.grad is not None]
        assert set(whole) == set(handle.whole())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        backward(other, step)
        plain.step()
        plain.zero_grad()
    assert distance(model, other) < 1e-5


# What is refused


def test_an_exact_norm_of_sums() -> None:
    optimizer = make()[1]
    said = r"refit='first' with norm='exact' and accumulation above 1.*'projected' or 'previous'"
    with pytest.raises(ValueError, match=said):
        update_in_backward(optimizer, 2, 1.0, refit="first")
    handle = update_in_backward(optimizer, 1, 1.0, refit="first")
    with pytest.raises(ValueError, match=said):
        handle.accumulation = 2
    assert handle.accumulation == 1


def test_other_values() -> None:
    optimizer = make()[1]
    with pytest.raises(ValueError, match="refit='last': accepted"):
        update_in_backward(optimizer, refit="last")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {}), ("fira_adamw", {}), ("apollo_adamw", {})],
)
def test_methods_that_need_all_gradients_say_so(name: str, options: dict[str, Any]) -> None:
    optimizer = make(name, **options)[1]
    with pytest.warns(UserWarning, match=r"refit='first' has no effect on \w+ with these options"):
        update_in_backward(optimizer, 2, refit="first")
