"""Optimizers on a GPU: kernels beside pure torch, and steps as CUDA graphs.

Plain functions of a device, for pytest and for `./scripts/gpu-check`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from native_training import METHODS, Layers, trained

from lowrank.optimizers import build


@dataclass(frozen=True)
class Case:
    """Something that must hold.

    Attributes:
        name: of it.
        holds: raises unless it does.
        cuda: needs a GPU.
    """

    name: str
    holds: Callable[[torch.device], None]
    cuda: bool = False


def kernels_agree_with_pure_torch(
    device: torch.device, *, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Weights after six steps are close, in units of the way that they went."""
    native = trained(name, dtype, "native", device=device.type, **options)
    plain = trained(name, dtype, "torch", device=device.type, **options)
    start = [w.detach().float() for w in Layers(dtype).parameters()]
    for ours, theirs, before in zip(native, plain, start, strict=True):
        moved = torch.linalg.vector_norm(theirs - before)
        difference = torch.linalg.vector_norm(ours - theirs)
        limit = 1e-3 if dtype == torch.float32 else 0.05
        assert difference <= limit * moved, (float(difference), float(moved))


def a_captured_step_equals_an_eager_one(
    device: torch.device, *, name: str, dtype: torch.dtype
) -> None:
    """To the bit."""
    models = [Layers(dtype).to(device) for _ in range(2)]
    optimizers = [
        build(name, model, lr=1e-2, rank=8, update_proj_gap=1000, capturable=True)
        for model in models
    ]
    generator = torch.Generator(device).manual_seed(0)
    for weights in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(weights[0].shape, generator=generator, device=device).to(dtype)
        for weight in weights:
            weight.grad = grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for optimizer in optimizers:  # the first step fits the bases
            optimizer.step()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(3):
        graph.replay()
        optimizers[1].step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def replays_follow_a_refresh(device: torch.device, *, name: str) -> None:
    """A graph that was captured before a refresh goes on with the new bases."""
    models = [Layers(torch.float32).to(device) for _ in range(2)]
    optimizers = [
        build(name, model, lr=1e-2, rank=8, update_proj_gap=4, capturable=True) for model in models
    ]
    generator = torch.Generator(device).manual_seed(0)
    for weights in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(weights[0].shape, generator=generator, device=device)
        for weight in weights:
            weight.grad = grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            optimizers[0].step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    graph.replay()
    graph.replay()
    optimizers[0].step()  # the fifth step refits
    graph.replay()
    graph.replay()
    for _ in range(7):
        optimizers[1].step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _described(options: dict[str, Any]) -> str:
    return "".join(f", {key}={value}" for key, value in options.items())


CASES = (
    *(
        Case(
            f"{name} agrees with pure torch, {str(dtype)[6:]}{_described(options)}",
            partial(kernels_agree_with_pure_torch, name=name, dtype=dtype, options=options),
        )
        for name, dtype, options in METHODS
    ),
    *(
        Case(
            f"a captured step of {name} equals an eager one, {str(dtype)[6:]}",
            partial(a_captured_step_equals_an_eager_one, name=name, dtype=dtype),
            cuda=True,
        )
        for name in ("galore_adamw", "fira_adamw", "apollo_adamw", "apollo_mini_adamw")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case(
            f"replays of {name} follow a refresh",
            partial(replays_follow_a_refresh, name=name),
            cuda=True,
        )
        for name in ("galore_adamw", "apollo_adamw")
    ),
)
