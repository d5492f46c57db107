"""What each of several processes checks of DDP that sends projected gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from low_rank_runs import (
    GAP,
    VARIANTS,
    Sent,
    alone,
    backward,
    batch,
    close,
    exact_methods,
    loss_of,
    make,
    project_gradients,
    same_on_all,
    together,
)
from support import TinyBlock, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import LowRankOptimizer, build, register_low_rank_hook
from lowrank.optimizers.engine.low_rank_comparison import CHANGED, EACH


def check_methods(rank: int, world: int) -> None:
    """Accumulation and clipping by the projected norm: the weights of one process."""
    for name in exact_methods():
        own = together(name, 12, 2, clip=0.05, dtype=torch.float64)
        same_on_all(own)
        close(own, alone(name, 12, 2, clip=0.05, dtype=torch.float64), atol=1e-12)


def check_methods_in_fp32(rank: int, world: int) -> None:
    for name in exact_methods():
        if not name.endswith("8bit"):  # in which a last bit may become another code
            own = together(name, 12, 2, clip=0.05)
            same_on_all(own)
            close(own, alone(name, 12, 2, clip=0.05))


def check_plain(rank: int, world: int) -> None:
    """Without a clip the weights of DDP without the hook."""
    cases = [(name, torch.float32, 1e-5, {}) for name in exact_methods()]
    cases += [(name, torch.float64, 1e-12, options) for name, options in VARIANTS.values()]
    for name, dtype, atol, options in cases:
        given = {"dtype": dtype, **options}
        own = together(name, 12, 1, None, {"bucket_cap_mb": 0.002}, **given)
        same_on_all(own)
        close(own, together(name, 12, 1, None, hooked=False, **given), atol)


def check_wrappers(rank: int, world: int) -> None:
    """All that changes what DDP gives to the hook."""
    plain = together("galore_adamw", 12, 2, None, hooked=False, dtype=torch.float64)
    for ddp in (
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.002},
        {"find_unused_parameters": True},
    ):
        parts = 1 if "static_graph" in ddp else 2
        if parts == 1:
            plain_one = together("galore_adamw", 12, 1, None, hooked=False, dtype=torch.float64)
        own = together("galore_adamw", 12, parts, None, ddp, dtype=torch.float64)
        same_on_all(own)
        close(own, plain if parts == 2 else plain_one, atol=1e-12)


class Branches(TinyBlock):
    """A projected matrix that only the first process uses, and one that none does at times."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp["gate_proj"] = nn.Linear(16, 24, bias=False)
        self.mlp["extra_proj"] = nn.Linear(16, 24, bias=False)
        self.used: tuple[str, ...] = ()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for name in self.used:
            x = x + self.mlp["down_proj"](self.mlp[name](x))
        x = x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))
        return self.lm_head(self.norm(x + self.self_attn["q_proj"](x)))


def check_unused(rank: int, world: int) -> None:
    results = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = Branches().double()
        made = build("galore_adamw", model, lr=1e-3, rank=4, update_proj_gap=GAP)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        if hooked:
            register_low_rank_hook(wrapped, made)
        for step in range(12):
            model.used = ("gate_proj",) if rank == 0 else ()
            if step % 4 == 1:
                model.used += ("extra_proj",)
            backward(wrapped, step, rank, world, 1)
            made.step()
            made.zero_grad()
        steps = [int(made.state[model.mlp[n].weight]["step"]) for n in ("gate_proj", "extra_proj")]
        assert steps == [12, 3]
        results.append(weights(model))
    same_on_all(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


def compare_gradients(
    model: nn.Module, made: LowRankOptimizer, gradients: Callable[[nn.Module], None], least: float
) -> None:
    """That `.grad` is, up to `least` of its norm, the mean's projection; leaves `.grad` there."""
    gradients(model.module)
    params = list(model.parameters())
    for param in params:
        mean = param.grad.float() / dist.get_world_size()
        dist.all_reduce(mean)
        param.grad.copy_(mean)
    project_gradients(made)
    wanted = [param.grad.float() for param in params]
    made.zero_grad()
    gradients(model)
    for param, grad in zip(params, wanted, strict=True):
        assert param.grad.dtype == param.dtype
        assert float((param.grad.float() - grad).norm()) < least * float(grad.norm())


def check_bf16(rank: int, world: int) -> None:
    for name in ("galore_adamw", "qgalore_adamw_8bit", "coap_adamw"):
        same_on_all(together(name, 9, 2, None, dtype=torch.bfloat16, lr=1e-2))
        model, made = make(name, dtype=torch.bfloat16, lr=1e-2)
        wrapped = DistributedDataParallel(model)
        register_low_rank_hook(wrapped, made)
        for step in range(9):
            given = partial(backward, step=step, rank=rank, world=world, parts=1)
            compare_gradients(wrapped, made, given, 0.02)
            made.step()
            made.zero_grad()


def check_int8_weights(rank: int, world: int) -> None:
    own = together("qgalore_adamw_8bit", 9, 2, 0.05, weight_bits=8)
    same_on_all(own)


def check_autocast_and_scaler(rank: int, world: int) -> None:
    """Backward inside autocast, a scaled loss, and a gradient that overflows on one process."""
    model, made = make("qgalore_adamw_8bit")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):

        def gradients(model: nn.Module, step: int = step) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch(step, 0).chunk(world)[rank])
                if step == 4 and rank == 1:
                    loss = loss * math.inf
                scaler.scale(loss).backward()

        if step == 4:
            gradients(wrapped)
        else:
            compare_gradients(wrapped, made, gradients, 1e-5)
        scaler.step(made)
        scaler.update()
        made.zero_grad()
    assert int(made.state[model.mlp["up_proj"].weight]["step"]) == 7
    assert scaler.get_scale() == 2.0**9
    same_on_all(weights(model))


def check_skipped(rank: int, world: int) -> None:
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    for step in range(8):
        factor = math.nan if step == 4 and rank else 1.0
        (loss_of(wrapped, batch(step, 0)) * factor).backward()
        if step == 4:
            with pytest.warns(UserWarning, match="non-finite"):
                made.step()
        else:
            made.step()
        made.zero_grad()
    assert made.skipped == len(list(model.parameters()))
    same_on_all(weights(model))


def check_closure(rank: int, world: int) -> None:
    def train(hooked: bool) -> list[Tensor]:
        model, made = make("galore_adamw")
        wrapped = DistributedDataParallel(model)
        if hooked:
            register_low_rank_hook(wrapped, made)
        for step in range(8):

            def closure(step: int = step) -> float:
                made.zero_grad()
                loss = loss_of(wrapped, batch(step, rank))
                loss.backward()
                return float(loss)

            made.step(closure)
        return weights(model)

    close(train(True), train(False))


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
    model, made = make("galore_adamw", seed=rank, projector="random", distribution="orthonormal")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    backward(wrapped, 0, rank, world, 1)
    made.step()
    with pytest.raises(ValueError, match="different options or parameters"):
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
        with pytest.raises(ValueError, match="or a change on some of them only"):
            backward(wrapped, 3, rank, world, 1)


def check_synchronised_parts(rank: int, world: int) -> None:
    """Accumulation without `no_sync`: a gradient that was projected is added to."""

    def train(hooked: bool) -> list[Tensor]:
        model, made = make("coap_adamw", dtype=torch.float64)
        wrapped = DistributedDataParallel(model)
        if hooked:
            register_low_rank_hook(wrapped, made)
        for step in range(9):
            for part in range(3):
                loss_of(wrapped, batch(step, part).chunk(world)[rank]).backward()
            made.step()
            made.zero_grad()
        return weights(model)

    close(train(True), train(False), atol=1e-12)


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
QUICK = [check for check in ALL if check not in (check_plain, check_methods_in_fp32)]
