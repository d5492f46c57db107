"""Loops that don't go with update_in_backward raise one clear line, before anything is lost."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_backward_runs import (
    Run,
    backward,
    batch,
    loss_of,
    make,
    row_of,
    unchanged,
    unexamined,
)
from support import tiny_model
from torch import nn

from lowrank.optimizers import (
    GaLoreAdamW,
    param_groups,
    update_in_backward,
)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with unexamined():
        yield


# Loops


@pytest.mark.parametrize("parts", [1, 2])
def test_more_backward_passes(parts: int) -> None:
    model, optimizer = make()
    update_in_backward(optimizer, parts)
    backward(model, 0, parts)
    check = unchanged(model)
    with pytest.raises(
        RuntimeError, match=f"backward pass {parts + 1} of a step, with accumulation"
    ):
        backward(model, 1)
    check()
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1, parts)
    optimizer.step()


def test_fewer_backward_passes() -> None:
    model, optimizer = make()
    update_in_backward(optimizer, 3)
    backward(model, 0, 2)
    check = unchanged(model)
    with pytest.raises(
        RuntimeError, match="after 2 of 3 backward passes: accepted are all of them"
    ):
        optimizer.step()
    check()
    backward(model, 0)
    optimizer.step()


def test_a_step_that_is_left_out() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    backward(model, 0)
    with pytest.raises(
        RuntimeError, match=r"zero_grad\(\) before step\(\), when 7 parameters were"
    ):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_backward_pass_with_an_error(parts: int) -> None:
    model, optimizer = make()
    update_in_backward(optimizer, parts)

    def fail(grad: torch.Tensor) -> None:
        raise MemoryError

    hook = model.mlp["up_proj"].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        backward(model, 0)
    with pytest.raises(RuntimeError, match=r"step\(\) after a backward pass that did not end"):
        optimizer.step()
    hook.remove()
    with pytest.raises(RuntimeError, match="before this one did not end: accepted is zero_grad"):
        backward(model, 0)
    if parts == 1:
        with pytest.warns(UserWarning, match=r"after \d parameters were updated: these updates"):
            optimizer.zero_grad()
    else:
        optimizer.zero_grad()
    backward(model, 0, parts)
    optimizer.step()


def test_rates_that_change_after_the_backward_pass() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    backward(model, 0)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    with pytest.raises(ValueError, match=r"learning rate.*were changed after a backward pass"):
        optimizer.step()
    optimizer.param_groups[0]["lr"].mul_(2.0)
    optimizer.step()
    backward(model, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="were changed after a backward pass"):
        optimizer.step()


@pytest.mark.parametrize("change", [{"maximize": True}, {"update_proj_gap": 1}, {"scale": 0.5}])
def test_options_that_change_between_micro_batches(change: dict[str, Any]) -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    for step in range(2):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 2)
    check = unchanged(model)
    optimizer.param_groups[0].update(change)
    if "scale" in change:
        backward(model, 2)  # needs no more than the projection
        return
    with pytest.raises(ValueError, match=r"left only a projection of the gradient of \S+weight"):
        backward(model, 2)
    check()


def test_state_that_is_cleared_between_micro_batches() -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    for step in range(2):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 2)
    optimizer.state.clear()
    with pytest.raises(ValueError, match="left only a projection of the gradient"):
        backward(model, 2)


@pytest.mark.parametrize("norm", ["exact", "projected"])
def test_options_that_change_before_a_step_that_clips(norm: Any) -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 1, 1.0, norm)
    backward(model, 0)
    optimizer.step()
    backward(model, 1)
    check = unchanged(model)
    optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(ValueError, match="left only a projection of the gradient"):
        optimizer.step()
    check()


def test_gradients_that_are_clipped_by_hand() -> None:
    """Some are gone; where all are whole it is right."""
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 1, 100.0)
    backward(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # all matrices are due
    optimizer.step()
    backward(model, 1)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="accepted is max_norm of update_in_backward in the place"):
        optimizer.step()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_gradients_that_are_clipped_when_most_are_gone(parts: int, clip: Any) -> None:
    """As the Hugging Face trainer does by default."""
    model, optimizer = make()
    update_in_backward(optimizer, parts)
    backward(model, 0, parts)
    clip(model.parameters(), 100.0)
    with pytest.raises(ValueError, match="and 7 used already: accepted is max_norm of update_in"):
        optimizer.step()


def test_gradients_that_are_cleared_behind_its_back() -> None:
    model, optimizer = make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    for step in range(2):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 2)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"was replaced between backward passes.*zero_grad"):
        backward(model, 2)


def test_graphs_of_gradients() -> None:
    model, optimizer = make()
    update_in_backward(optimizer)
    loss, check = loss_of(model, batch(0, 0)), unchanged(model)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    with pytest.raises(ValueError, match=r"backward\(create_graph=True\) of \S+ with update_in"):
        loss.backward(create_graph=True)
    check()


def test_sparse_gradients() -> None:
    model, optimizer = make()
    model.embed_tokens.sparse = True
    update_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has a sparse gradient"):
        backward(model, 0)


def test_layers_that_are_not_attached() -> None:
    model, optimizer = copy.deepcopy(make("relora_adamw"))
    update_in_backward(optimizer)
    check = unchanged(model)
    with pytest.raises(ValueError, match="has no layers, since it was copied"):
        backward(model, 0)
    check()


# Copies and states


def test_in_the_middle_of_a_step() -> None:
    model, optimizer = make()
    handle = update_in_backward(optimizer, 2)
    backward(model, 0)
    state = optimizer.state_dict()
    for call, said in (
        (lambda: copy.deepcopy(optimizer), "a pickle or copy of the optimizer after 1 of 2"),
        (lambda: pickle.dumps(optimizer), "a pickle or copy of the optimizer after 1 of 2"),
        (handle.remove, r"remove\(\) after 1 of 2"),
        (lambda: optimizer.load_state_dict(state), r"load_state_dict\(\) after 1 of 2"),
        (lambda: setattr(handle, "accumulation", 3), "a change of accumulation after 1 of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="can't be copied"):
        copy.deepcopy(handle)
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(handle)
    backward(model, 0)
    with pytest.raises(
        ValueError, match=r"state_dict\(\) in the middle of a step, after a backward"
    ):
        optimizer.state_dict()
    optimizer.step()


def half_done(**options: Any) -> dict[str, Any]:
    """The state after three steps and one of two passes."""
    model, optimizer = make(update_proj_gap=10, **options)
    update_in_backward(optimizer, 2)
    for step in range(3):
        backward(model, step, 2)
        optimizer.step()
    backward(model, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_pending_gradients_without_a_handle() -> None:
    state, (_, optimizer) = half_done(), make(update_proj_gap=10)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match="saved after 1 backward passes of an unfinished step: acc"
    ):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("pending_projected", torch.zeros(3, 3)),
        ("pending_gradient", torch.zeros(1)),
        ("pending_gradient", 1.0),
    ],
)
def test_pending_gradients_that_do_not_fit(entry: str, value: Any) -> None:
    state, (_, optimizer) = half_done(), make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    key = next(key for key, own in state["state"].items() if entry in own)
    state["state"][key][entry] = value
    with pytest.raises(ValueError, match=f"has {entry} of shape .*; accepted is"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("passes", [3, -1, 1.0, None])
def test_numbers_of_passes_that_do_not_fit(passes: Any) -> None:
    state, (_, optimizer) = half_done(), make(update_proj_gap=10)
    update_in_backward(optimizer, 2)
    state["param_groups"][0]["in_backward_passes"] = passes
    with pytest.raises(
        ValueError, match="backward passes of an unfinished step: accepted is at most"
    ):
        optimizer.load_state_dict(state)


def test_a_full_weight_s_gradient_is_not_saved() -> None:
    model, optimizer = make("loqt_adamw")
    update_in_backward(optimizer, 2)
    backward(model, 0)
    with pytest.raises(ValueError, match="would lack the gradient of the full weight of"):
        optimizer.state_dict()


def test_without_warnings() -> None:
    """Right use says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model()
        optimizer = GaLoreAdamW(param_groups(model, rank=4), lr=1e-3)
        update_in_backward(optimizer, max_norm=1.0)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()


def test_projections_that_were_saved_have_no_exact_norm() -> None:
    row = row_of("galore_adamw")
    own = Run(row, 3, gap=5).steps(range(1))
    loss_of(own.model, batch(1, 0)).backward()
    states = own.states()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="norm='exact' with accumulation")
        other = Run(row, 3, 0.1, "exact", gap=5)
    with pytest.raises(ValueError, match=r"1 backward passes .* projections are left"):
        other.load(states)
    Run(row, 3, 0.1, "projected", gap=5).load(states)
