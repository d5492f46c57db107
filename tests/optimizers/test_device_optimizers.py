"""Optimizers on a GPU: kernels beside pure torch, and steps as CUDA graphs.

Runs in `./scripts/gpu-check`.
"""

from typing import Any

import pytest
import torch
from test_kernels import METHODS, Layers, trained

from lowrank.optimizers import build

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize(("name", "dtype", "options"), METHODS)
def test_kernels_agree_with_pure_torch(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    native = trained(name, dtype, "native", device="cuda", **options)
    plain = trained(name, dtype, "torch", device="cuda", **options)
    start = [w.detach().float() for w in Layers(dtype).parameters()]
    for ours, theirs, before in zip(native, plain, start, strict=True):
        moved = torch.linalg.vector_norm(theirs - before)
        difference = torch.linalg.vector_norm(ours - theirs)
        limit = 1e-3 if dtype == torch.float32 else 0.05
        assert difference <= limit * moved, (float(difference), float(moved))


@pytest.mark.parametrize("name", ["galore_adamw", "fira_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_equals_an_eager_one(name: str, dtype: torch.dtype) -> None:
    models = [Layers(dtype).to("cuda") for _ in range(2)]
    optimizers = [
        build(name, model, lr=1e-2, rank=8, update_proj_gap=1000, capturable=True)
        for model in models
    ]
    generator = torch.Generator("cuda").manual_seed(0)
    for weights in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(weights[0].shape, generator=generator, device="cuda").to(dtype)
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
