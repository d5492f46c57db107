"""Updates in the backward pass: ways in which loops are written."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_backward_runs import Run, backward, batch, distance, loss_of, make, row_of, unexamined
from support import tiny_model
from table import assert_same
from torch import Tensor, nn

from lowrank.optimizers import LowRankOptimizer, build, param_groups, update_in_backward

STEPS = 5


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with unexamined():
        yield


# Loops


@pytest.mark.parametrize("name", ["galore_adamw", "loqt_adamw", "switchlora_adamw"])
def test_closures(name: str) -> None:
    runs = []
    for on in (True, False):
        model, optimizer = make(name)
        if on:
            update_in_backward(optimizer)
        for step in range(STEPS):

            def closure(model: Any = model, made: Any = optimizer, step: int = step) -> Tensor:
                made.zero_grad()
                loss = loss_of(model, batch(step, 0))
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0
        runs.append(model)
    assert_same(*runs)


def test_two_backward_passes_of_one_graph() -> None:
    """They count as two; nothing is updated in the first."""
    runs = []
    for on in (True, False):
        model, optimizer = make()
        if on:
            update_in_backward(optimizer, 2)
        for step in range(STEPS):
            logits = model(batch(step, 0))
            logits.square().mean().backward(retain_graph=True)
            torch.logsumexp(logits, -1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


def test_gradients_of_gradients_on_the_side() -> None:
    """`torch.autograd.grad` runs no hook."""
    model, optimizer = make("adamw")
    handle = update_in_backward(optimizer)
    loss = loss_of(model, batch(0, 0))
    (slope,) = torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
    torch.autograd.grad(slope.square().sum(), model.norm.weight)
    assert not any(handle.updated(param) for param in model.parameters())
    backward(model, 0)
    assert [n for n, p in model.named_parameters() if not handle.updated(p)] == ["norm.weight"]


def test_gradients_that_are_dropped() -> None:
    """`zero_grad()` drops projected sums too, before the last pass."""
    runs = []
    for on in (True, False):
        model, optimizer = make(update_proj_gap=10)
        if on:
            update_in_backward(optimizer, 2)
        for step in range(STEPS):
            (loss_of(model, batch(step, 7)) / 2).backward()
            optimizer.zero_grad()
            backward(model, step, 2)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


def test_steps_with_gradients_set_by_hand() -> None:
    model, optimizer = make("adamw")
    other = copy.deepcopy(model)
    plain = build("adamw", other, lr=1e-2)
    update_in_backward(optimizer, 4)
    for own in (model, other):
        for param in own.parameters():
            param.grad = torch.ones_like(param)
    optimizer.step()
    plain.step()
    assert_same(model, other)


def test_autocast() -> None:
    runs = []
    for on in (True, False):
        model, optimizer = make()
        if on:
            update_in_backward(optimizer)
        for step in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert_same(*runs)


def test_the_scheduler_finds_its_steps() -> None:
    own = Run(row_of("galore_adamw"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.steps(range(2))
    assert own.scheduler.get_last_lr() == pytest.approx(
        [1e-2 / 3] * len(own.optimizer.param_groups)
    )


def test_step_hooks_run() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_refresh_hook(lambda event: seen.append(event.name))
    backward(model, 0)
    matrices = ["mlp.down_proj.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight"]
    assert seen == matrices  # in the backward pass, the last layer first
    optimizer.step()
    assert seen[3:] == ["before", "after"]


def test_two_optimizers_of_one_model() -> None:
    runs = []
    for on in (True, False):
        model = tiny_model()
        first, *rest = param_groups(model, rank=4, update_proj_gap=2)
        made = [type(make()[1])([first], lr=1e-2), type(make("adamw")[1])(rest, lr=1e-3)]
        for optimizer in made if on else ():
            update_in_backward(optimizer, 2)
        for step in range(STEPS):
            backward(model, step, 2)
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


def test_fewer_passes_in_the_last_step() -> None:
    runs = []
    for on in (True, False):
        model, optimizer = make()
        handle = update_in_backward(optimizer, 3) if on else None
        for step, parts in enumerate((3, 3, 2)):
            if handle is not None:
                handle.accumulation = parts
            backward(model, step, parts)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


# Turning it off, and copies


def test_remove() -> None:
    own, other = Run(row_of("galore_adamw")), Run(row_of("galore_adamw"), on=False)
    with own.handle as handle:
        own.steps(range(2))
    assert own.optimizer._in_backward is None
    own.handle = None
    assert_same(own.steps(range(2, 4)).model, other.steps(range(4)).model)
    handle.remove()  # once more does nothing
    update_in_backward(own.optimizer).remove()
    assert not any(param._post_accumulate_grad_hooks for param in own.params)


def test_an_error_in_a_with_block_stays_the_error() -> None:
    model, optimizer = make()

    def half_a_step() -> None:
        with update_in_backward(optimizer, 2):
            backward(model, 0)
            raise KeyError

    with pytest.raises(KeyError):
        half_a_step()
    assert optimizer._in_backward is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_ordinary(how: Callable[[Any], tuple[nn.Module, LowRankOptimizer]]) -> None:
    own = Run(row_of("galore_adamw")).steps(range(2))
    model, optimizer = how((own.model, own.optimizer))
    for step in range(2, 4):
        backward(model, step)
        assert all(param.grad is not None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    for group in own.optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]
    own.scheduler.base_lrs = [0.0]
    for step in range(2, 4):
        backward(own.model, step)
        own.optimizer.step()
    assert_same(own.model, model)


def test_nothing_is_kept_alive() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer)
    backward(model, 0)
    optimizer.step()
    known = weakref.ref(optimizer)
    del optimizer, handle
    gc.collect()
    assert known() is None
    backward(model, 1)
    assert all(param.grad is not None for param in model.parameters())
