"""What each of several processes checks of DDP that sends projected gradients: after changes.

Options and states that change, also on one process alone, and what else all must do alike.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from low_rank_runs import Sent, backward, close, make, same_on_all
from support import weights
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import register_low_rank_hook
from lowrank.optimizers.engine.low_rank_comparison import CHANGED, EACH


def check_loading(rank: int, world: int) -> None:
    """A state loaded later counts; different ones are an error on all processes."""
    model, made = make("galore_adamw", dtype=torch.float64)
    wrapped = DistributedDataParallel(model)
    hook = register_low_rank_hook(wrapped, made)

    def train(steps: range) -> None:
        for step in steps:
            backward(wrapped, step, rank, world, 1)
            made.step()
            made.zero_grad()

    train(range(5))
    saved = copy.deepcopy((model.state_dict(), made.state_dict()))
    train(range(5, 9))
    straight = weights(model)
    train(range(20, 23))
    model.load_state_dict(saved[0])
    made.load_state_dict(saved[1])
    assert hook.traffic().next == hook.traffic().whole + EACH
    train(range(5, 6))
    assert hook.traffic().next == hook.traffic().whole + EACH  # due at the sixth step
    train(range(6, 7))
    assert hook.traffic().next == hook.traffic().between + CHANGED
    train(range(7, 9))
    close(straight, weights(model), atol=1e-12)

    if rank == 1:
        state = saved[1]["state"]
        basis = next(entry["basis"] for entry in state.values() if "basis" in entry)
        basis[0] *= 1 + 1e-6
    made.load_state_dict(saved[1])
    train(range(1))  # whole gradients
    made.param_groups[0]["update_proj_gap"] = 1000
    train(range(1))
    with pytest.raises(ValueError, match="have different bases: accepted are equal options"):
        train(range(1))


def check_different_options(rank: int, world: int) -> None:
    """In the first step of copies, and by the hook before projections travel."""
    options = {"projector": "random", "distribution": "orthonormal"}
    said = r"seed of group 0 \(.*\): 0 on process 0 and 1 on process 1"
    model, made = make("galore_adamw", seed=rank, **options)
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    backward(wrapped, 0, rank, world, 1)
    with pytest.raises(ValueError, match=said):
        made.step()
    model, made = make("galore_adamw", **options)
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    backward(wrapped, 0, rank, world, 1)
    made.step()
    made.param_groups[0]["seed"] = rank
    with pytest.raises(ValueError, match=f"different options or parameters, {said}"):
        backward(wrapped, 1, rank, world, 1)


def check_lone_changes(rank: int, world: int) -> None:
    """What one process does alone is an error on all of them, and none waits."""
    for kind in ("load", "option", "step"):
        model, made = make("galore_adamw", update_proj_gap=50)
        wrapped = DistributedDataParallel(model)
        register_low_rank_hook(wrapped, made)
        for step in range(3):
            backward(wrapped, step, rank, world, 1)
            made.step()
        if rank == 1 and kind == "load":
            made.load_state_dict(copy.deepcopy(made.state_dict()))
        elif rank == 1 and kind == "option":
            made.param_groups[0]["rank"] = 5
        elif rank == 1:
            made.step()
        said = (
            "or a change on some of them only" if kind != "option" else "rank of group 0 .*: 4 on"
        )
        with pytest.raises(ValueError, match=said):
            backward(wrapped, 3, rank, world, 1)


def check_changed_options(rank: int, world: int) -> None:
    results = []
    for hooked in (False, True):
        model, made = make("galore_adamw", update_proj_gap=50)
        wrapped = DistributedDataParallel(model)
        hook = register_low_rank_hook(wrapped, made) if hooked else None
        for step in range(12):
            made.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)  # as a cyclic schedule does
            made.param_groups[0]["lr"] = 1e-3 / (1 + step)
            if step == 4:
                made.param_groups[0]["rank"] = 5
            if step == 8:
                made.param_groups[0]["moments"] = "rotate"
            if hook is not None:
                found, whole = hook.traffic(), step in (0, 4, 8)
                comparison = CHANGED if step in (1, 5, 9) else 0
                wanted = found.whole + EACH if whole else found.between
                assert found.next == wanted + comparison, step
            with Sent() as sent:
                backward(wrapped, step, rank, world, 1)
            if hook is not None:
                assert sent.bytes == found.next
            made.step()
            made.zero_grad()
        results.append(weights(model))
    same_on_all(results[1])
    close(*results)

    # Too late: the gradient that the refit needs was not sent.
    backward(wrapped, 0, rank, world, 1)
    made.param_groups[0]["rank"] = 3
    before = weights(model)
    with pytest.raises(ValueError, match=r"changed after the backward pass.*_proj"):
        made.step()
    assert all(map(torch.equal, before, weights(model)))
    made.zero_grad()
    backward(wrapped, 0, rank, world, 1)
    made.step()
    assert made.state[model.mlp["up_proj"].weight]["basis"].shape[1] == 3
    same_on_all(weights(model))


def check_sharing(rank: int, world: int) -> None:
    model, made = make("galore_adamw")
    made.share_refreshes()
    shared = made._shared
    register_low_rank_hook(DistributedDataParallel(model), made)
    assert made._shared is shared
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    single = [dist.new_group([r]) for r in range(world)][rank]
    made.share_refreshes(single)
    with pytest.raises(ValueError, match=r"share_refreshes.*other processes"):
        register_low_rank_hook(wrapped, made)
    assert not wrapped._comm_hooks
    # A part of the processes trains the model, with all that the hook needs.
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model, process_group=single)
    register_low_rank_hook(wrapped, made)
    assert made._shared.group is single
    for step in range(4):
        backward(wrapped, step, rank, world, 1)
        made.step()
        made.zero_grad()


def check_sharing_later(rank: int, world: int) -> None:
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    made.share_refreshes()
    backward(wrapped, 0, rank, world, 1)
    made.share_refreshes([dist.new_group([r]) for r in range(world)][rank])
    with pytest.raises(ValueError, match=r"share_refreshes.*other processes"):
        backward(wrapped, 1, rank, world, 1)


def check_join(rank: int, world: int) -> None:
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    refused = pytest.raises(ValueError, match=r"join\(\) of a model with a low-rank hook")
    with refused, wrapped.join():
        backward(wrapped, 0, rank, world, 1)


ALL = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
