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
    expected_bytes,
    loss_of,
    make,
    project_gradients,
    same_on_all,
    together,
)
from support import TinyBlock, tiny_model, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import GaLoreAdamW, LowRankOptimizer, build, register_low_rank_hook
from lowrank.optimizers.engine.low_rank_comparison import CHANGED, EACH


def check_methods(rank: int, world: int) -> None:
    """Accumulation and clipping by the projected norm: the weights of one process."""
    for name in exact_methods():
        own = together(name, 12, 2, clip=0.05, dtype=torch.float64)
        same_on_all(own)
        if rank == 0:
            close(own, alone(name, 12, 2, clip=0.05, dtype=torch.float64), atol=1e-12)


def check_methods_in_fp32(rank: int, world: int) -> None:
    for name in exact_methods():
        if not name.endswith("8bit"):  # in which a last bit may become another code
            own = together(name, 12, 2, clip=0.05)
            same_on_all(own)
            if rank == 0:
                close(own, alone(name, 12, 2, clip=0.05))


def check_plain(rank: int, world: int) -> None:
    """Without a clip the weights of DDP without the hook."""
    names = exact_methods() if world > 2 else exact_methods()[::3]
    cases = [(name, torch.float32, 1e-5, {}) for name in names]
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
                return loss.item()

            made.step(closure)
        return weights(model)

    close(train(True), train(False))


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


def check_mixed_groups(rank: int, world: int) -> None:
    """Groups of several methods, gaps and schedules, under a rate that changes."""

    def train(hooked: bool) -> list[Tensor]:
        model = TinyBlock().double()
        model.load_state_dict(tiny_model(dtype=torch.float64).state_dict())
        own = {
            "up_proj": {"update_proj_gap": 5, "stagger": True},
            "q_proj": {"residual": "norm_scaled"},
            "down_proj": {"projector": "online", "schedule": "once"},
            "gate_proj": {"update_proj_gap": 4, "stagger": True},
        }
        model.mlp["gate_proj"] = copy.deepcopy(model.mlp["up_proj"])
        groups = [
            {"params": [p for n, p in model.named_parameters() if f"{key}.w" in n], "rank": 4, **of}
            for key, of in own.items()
        ]
        others = [n for n, _ in model.named_parameters() if not any(f"{k}.w" in n for k in own)]
        groups.append({"params": [p for n, p in model.named_parameters() if n in others]})
        made = GaLoreAdamW(groups, lr=1e-3)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        hook = register_low_rank_hook(wrapped, made) if hooked else None
        compared = 0
        for step in range(15):
            for group in made.param_groups:
                group["lr"] = 1e-3 / (1 + step)
            if hook is not None:
                expected = hook.traffic().next
                assert expected - EACH - expected_bytes(made) in (0, CHANGED)
                compared += expected - EACH - expected_bytes(made) == CHANGED
            with Sent() as sent:
                backward(wrapped, step, rank, world, 1)
            if hook is not None:
                assert sent.bytes == expected
            made.step()
            made.zero_grad()
        assert compared == int(hooked)
        return weights(model)

    for a, b in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


#: Of two processes; those of three repeat some in fp32.
ALL = [
    value
    for name, value in sorted(globals().items())
    if name.startswith("check_") and value is not check_methods_in_fp32
]
QUICK = [check_methods, check_skipped, check_closure, check_synchronised_parts]
#: Of more than two processes.
MORE = {
    3: [check_methods, check_methods_in_fp32, check_plain, check_unused, check_bf16],
    4: [*QUICK, check_wrappers],
}
