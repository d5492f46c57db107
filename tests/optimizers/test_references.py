"""Each optimizer equals its plain fp64 reference, refreshes and decay included."""

from __future__ import annotations

import pytest
import references
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.cuda import blockwise
from lowrank.optimizers import (
    Adafactor,
    AdamW,
    AdamW8bit,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    Muon,
)

SHAPES = ((14, 9), (9, 14), (11, 11))
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
EXACT_MODES = ("svd", "eigh")


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2)) for k in range(steps)]


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        optimizer.step()
    return weight.detach()


def start(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter((0.2 * matrix(*shape, 0)).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("correct_bias", [True, False])
def test_galore_adamw(shape: tuple[int, int], proj_type: str, correct_bias: bool) -> None:
    weight, grads = start(shape), gradients(shape)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "proj_type": proj_type}
    made = GaLoreAdamW(
        [{**group, "scale": 0.5}],
        lr=0.02,
        weight_decay=0.1,
        refresh="svd",
        correct_bias=correct_bias,
    )
    expected = references.galore_adamw(
        grads,
        weight.detach(),
        rank=4,
        gap=5,
        scale=0.5,
        proj_type=proj_type,
        lr=0.02,
        weight_decay=0.1,
        correct_bias=correct_bias,
    )
    torch.testing.assert_close(run(made, weight, grads), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("lr", [0.02, None])
def test_galore_adafactor(
    shape: tuple[int, int], proj_type: str, beta1: float | None, lr: float | None
) -> None:
    weight, grads = start(shape), gradients(shape)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "proj_type": proj_type}
    made = GaLoreAdafactor(
        [{**group, "scale": 0.5}], lr=lr, beta1=beta1, weight_decay=0.1, refresh="svd"
    )
    expected = references.adafactor(
        grads,
        weight.detach(),
        lr=lr,
        rank=4,
        gap=5,
        scale=0.5,
        proj_type=proj_type,
        beta1=beta1,
        weight_decay=0.1,
    )
    torch.testing.assert_close(run(made, weight, grads), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=str)
@pytest.mark.parametrize("warmup_init", [False, True])
def test_plain_adafactor(shape: tuple[int, int], warmup_init: bool) -> None:
    weight, grads = start(shape), gradients(shape)
    made = Adafactor([weight], warmup_init=warmup_init)
    expected = references.adafactor(grads, weight.detach(), lr=None, warmup_init=warmup_init)
    torch.testing.assert_close(run(made, weight, grads), expected, rtol=1e-9, atol=1e-11)


def test_plain_groups_of_galore_are_transformers_adamw() -> None:
    weight, grads = start((9, 14)), gradients((9, 14))
    other = nn.Parameter(torch.zeros(4, 4))
    made = GaLoreAdamW(
        [{"params": [weight]}, {"params": [other], "rank": 2}], lr=0.02, weight_decay=0.1
    )
    expected = references.adam(
        grads, weight.detach(), lr=0.02, eps=1e-6, weight_decay=0.1, torch_form=False
    )
    torch.testing.assert_close(run(made, weight, grads), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = start((9, 14), dtype), start((9, 14), dtype)
    grads = gradients((9, 14))
    # torch keeps the moments in the weights' precision.
    precision = "bfloat16" if dtype == torch.bfloat16 else None
    made = AdamW([ours], lr=0.02, weight_decay=0.1, moments_dtype=precision)
    first = run(made, ours, grads)
    second = run(torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1, fused=True), theirs, grads)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)
    expected = references.adam(
        grads,
        start((9, 14), dtype).detach(),
        lr=0.02,
        eps=1e-8,
        weight_decay=0.1,
        torch_form=True,
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon(shape: tuple[int, int]) -> None:
    weight, grads = start(shape), gradients(shape)
    made = Muon([{"params": [weight], "use_muon": True}], lr=0.02, weight_decay=0.1)
    expected = references.muon(grads, weight.detach(), lr=0.02, momentum=0.95, weight_decay=0.1)
    torch.testing.assert_close(run(made, weight, grads), expected, rtol=1e-9, atol=1e-11)


def test_muon_follows_torchs() -> None:
    """torch's own Muon computes in bf16, so only roughly."""
    ours, theirs = start((14, 9), torch.float32), start((14, 9), torch.float32)
    grads = gradients((14, 9), steps=3)
    first = run(Muon([{"params": [ours], "use_muon": True}], lr=0.02), ours, grads)
    made = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True)
    torch.testing.assert_close(first, run(made, theirs, grads), rtol=0, atol=2e-3)


def dequantised(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pair = []
    for moment, signed in ((m, True), (v, False)):
        codes, absmax = blockwise.quantize_blockwise(moment.float(), signed)
        pair.append(blockwise.dequantize_blockwise(codes, absmax, signed).double())
    return pair[0], pair[1]


@pytest.mark.parametrize("projected", [False, True])
def test_8bit_adam_is_adam_on_dequantised_moments(projected: bool) -> None:
    shape, rank = (24, 40), 16
    weight, grads = start(shape, torch.float32), gradients(shape, steps=6)
    options = {"lr": 0.02, "weight_decay": 0.1, "min_8bit_size": 0}
    if projected:
        group = {"params": [weight], "rank": rank, "update_proj_gap": 100, "scale": 0.5}
        made: torch.optim.Optimizer = GaLoreAdamW8bit([group], **options, refresh="svd")
    else:
        made = AdamW8bit([weight], **options)
    left, scale = None, 1.0
    if projected:
        left, scale = references.galore_bases(grads[0].float(), rank, "std")[0], 0.5
    w = weight.detach().double()
    m = v = torch.zeros((rank, 40) if projected else shape, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        r = references.down(g, left, None)
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        c1, c2 = 1 - 0.9**t, (1 - 0.999**t) ** 0.5
        step = 0.02 * scale * references.up(m / c1 / (v.sqrt() / c2 + 1e-8), left, None)
        w = (w - step) * (1 - 0.002) if projected else w * (1 - 0.002) - step
        m, v = dequantised(m, v)
    # A moment within rounding of the middle between two codes may take the other one.
    before = weight.detach().clone()
    difference = run(made, weight, grads) - w
    assert difference.norm() < 5e-3 * (w - before).norm()


def test_8bit_trains_matrices_below_any_block() -> None:
    weight = start((64, 32), torch.float32)
    before = weight.detach().clone()
    made = GaLoreAdamW8bit([{"params": [weight], "rank": 8, "scale": 0.25}], lr=0.01)
    run(made, weight, gradients((64, 32), steps=3))
    assert (weight.detach() - before).norm() > 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_eigh_equals_svd_inside_one_subspace(shape: tuple[int, int], proj_type: str) -> None:
    """Within one subspace the update does not depend on the signs of the basis."""
    results = []
    for refresh in EXACT_MODES:
        weight = start(shape)
        group = {"params": [weight], "rank": 4, "update_proj_gap": 100, "proj_type": proj_type}
        made = GaLoreAdamW([group], lr=0.02, refresh=refresh)
        results.append(run(made, weight, gradients(shape)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)
