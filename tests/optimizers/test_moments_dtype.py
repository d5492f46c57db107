"""Moments under half-precision weights: in fp32 unless asked otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import hashed
from torch import nn

from lowrank.optimizers import available, build

HALVES = [torch.bfloat16, torch.float16]
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "exp_avg_sq_row", "exp_avg_sq_col")
SECONDS = ["adamw", "galore_adamw", "fira_adamw", "apollo_adamw", "coap_adamw", "frugal_adamw"]


class Mlp(nn.Module):
    """A projected matrix, an embedding and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.mlp = nn.Linear(16, 20)


def model_in(dtype: torch.dtype) -> Mlp:
    torch.manual_seed(0)
    return Mlp().to(dtype)


def constant_gradients(model: nn.Module, value: float) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adamw", torch.bfloat16),
        pytest.param("adamw", torch.float16, marks=pytest.mark.slow),
        ("galore_adamw", torch.bfloat16),
    ],
    ids=str,
)
def test_the_second_moment_decays(name: str, dtype: torch.dtype) -> None:
    """g = 1 for 1,000 steps, then 0.1 for 5,000: v = 0.0142 for an entry of the plain bias."""
    model = model_in(dtype)
    options = {} if name == "adamw" else {"rank": 4, "update_proj_gap": 10_000}
    optimizer = build(name, model, lr=0.0, **options)
    bias = model.mlp.bias
    for value, steps in ((1.0, 1000), (0.1, 5000)):
        bias.grad = torch.full_like(bias, value)
        for _ in range(steps):
            optimizer.step()
    expected = (1 - 0.999**1000) * 0.999**5000 + (1 - 0.999**5000) * 0.01
    second = optimizer.state[bias]["exp_avg_sq"]
    assert second.dtype == torch.float32
    # the gradient 0.1 is rounded to the weights' precision
    torch.testing.assert_close(second.double().mean().item(), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
# GaLore+ wants attention heads; its rule is GaLore's.
@pytest.mark.parametrize("name", [n for n in available() if n != "galore_plus_adamw"])
def test_moments_are_fp32_under_half_precision_weights(name: str, dtype: torch.dtype) -> None:
    optimizer = build(name, model_in(dtype), rank=4)
    for state in optimizer.state.values():
        for key in MOMENTS:
            if key in state and state[key].dtype != torch.uint8:
                assert state[key].dtype == torch.float32, key


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "online_subspace_lion", "galore_muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_moments_on_request(name: str, dtype: torch.dtype) -> None:
    model = model_in(dtype)
    optimizer = build(name, model, lr=1e-2, rank=4, moments_dtype="bfloat16")
    before = model.mlp.weight.detach().clone()
    for step in range(3):
        for i, param in enumerate(model.parameters()):
            param.grad = hashed(param.numel(), 10 * step + i).to(dtype).view_as(param)
        optimizer.step()
    kinds = {s[k].dtype for s in optimizer.state.values() for k in MOMENTS if k in s}
    assert kinds == {torch.bfloat16}
    assert model.mlp.weight.isfinite().all()
    assert not torch.equal(model.mlp.weight, before)


@pytest.mark.parametrize("name", SECONDS)
def test_half_precision_weights_follow_fp32_ones(name: str) -> None:
    """With fp32 moments a bf16 run differs from an fp32 one by the rounding of weights alone."""
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_in(torch.bfloat16).to(dtype)
        options: dict[str, Any] = {} if name == "adamw" else {"rank": 4, "update_proj_gap": 50}
        optimizer = build(name, model, lr=2.0**-6, **options)
        for step in range(20):
            for i, param in enumerate(model.parameters()):
                grad = 0.1 * hashed(param.numel(), 10 * step + i)
                param.grad = grad.bfloat16().to(dtype).view_as(param)
            optimizer.step()
        runs.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]))
    change = (
        runs[0] - torch.cat([p.flatten() for p in model_in(torch.bfloat16).float().parameters()])
    ).norm()
    assert (runs[0] - runs[1]).norm() < 0.1 * change


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="moments_dtype='float16'"):
        build("galore_adamw", model_in(torch.float32), rank=4, moments_dtype="float16")
