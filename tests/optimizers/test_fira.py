"""Fira: the fast algebra equals the paper's formulas written out with whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import FiraAdamW, GaLoreAdamW

SHAPES = ((14, 9), (9, 14), (11, 11))


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    # a size that jumps makes the limiter act
    return [
        1e-2 * (1.0 + (k % 4)) * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2))
        for k in range(steps)
    ]


def fira(
    grads: list[Tensor],
    weight: Tensor,
    *,
    rank: int,
    gap: int,
    alpha: float,
    beta: float,
    proj_type: str,
    limit: float | None,
    lr: float = 0.02,
    weight_decay: float = 0.1,
    eps: float = 1e-6,
) -> tuple[Tensor, int]:
    """The final weight and how often the limiter acted."""
    w, m, v, s, acted = weight.double().clone(), 0.0, 0.0, 0.0, 0
    left = right = None
    for k, g in enumerate(grads):
        if k % gap == 0:
            left, right = references.galore_bases(g, rank, proj_type)
        r = references.down(g, left, right)
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        n = m / (v.sqrt() + eps)
        axis = 1 if left is None else 0
        phi = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)
        outside = phi * (g - beta * references.up(r, left, right))
        if limit is not None:
            if k > 0:
                growth = max(outside.norm() / (s + 1e-8), limit) / limit
                acted += int(growth > 1)
                outside = outside / growth
            s = outside.norm()
        size = lr * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        w = w - size * (alpha * references.up(n, left, right) + outside)
        w = w - lr * weight_decay * w
    return w, acted


def run(weight: nn.Parameter, grads: list[Tensor], **options: Any) -> Tensor:
    group = {"params": [weight], "update_proj_gap": 5, **options}
    made = FiraAdamW([group], lr=0.02, weight_decay=0.1, refresh="svd")
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.25, None), (1.0, None), (0.25, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("limit", [1.01, None])
def test_equals_the_written_out_rule(
    shape: tuple[int, int], proj_type: str, alpha: float, beta: float | None, limit: float | None
) -> None:
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape)
    expected, acted = fira(
        grads,
        weight.detach(),
        rank=4,
        gap=5,
        alpha=alpha,
        beta=alpha if beta is None else beta,
        proj_type=proj_type,
        limit=limit,
    )
    assert acted > 0 or limit is None
    result = run(
        weight,
        grads,
        rank=4,
        alpha=alpha,
        residual_scale=beta,
        proj_type=proj_type,
        limiter=limit,
    )
    # the limiter's norm is stored in fp32
    tolerance = 1e-9 if limit is None else 1e-6
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_vanishes_at_full_rank(shape: tuple[int, int]) -> None:
    """With beta = 1 nothing is outside a full-rank subspace: Fira is GaLore."""
    grads = gradients(shape)
    ours, plain = (nn.Parameter(0.2 * matrix(*shape, 0)) for _ in range(2))
    result = run(ours, grads, rank=99, alpha=1.0, residual_scale=1.0)
    group = {"params": [plain], "rank": 99, "update_proj_gap": 5, "scale": 1.0}
    galore = GaLoreAdamW([group], lr=0.02, weight_decay=0.1, refresh="svd")
    for grad in grads:
        plain.grad = grad.clone()
        galore.step()
    torch.testing.assert_close(result, plain.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_follows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    start, grads = 0.2 * matrix(*shape, 0), gradients(shape)
    expected, _ = fira(
        grads, start, rank=4, gap=99, alpha=0.25, beta=0.25, proj_type="std", limit=1.01
    )
    weight = nn.Parameter(start.to(dtype))
    result = run(weight, grads, rank=4, alpha=0.25, update_proj_gap=99)
    error = (result.double() - expected).norm() / (expected - start).norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]


def test_a_basis_that_is_not_orthonormal_changes_the_norm() -> None:
    """Stored in bfloat16 the basis's own Gram matrix enters the residual's norm."""
    shape = (9, 14)
    grads = gradients(shape)
    weight = nn.Parameter((0.2 * matrix(*shape, 0)).float())
    group = {"params": [weight], "rank": 4, "alpha": 1.0, "basis": "bfloat16"}
    made = FiraAdamW([{**group, "update_proj_gap": 99}], lr=0.02)
    for grad in grads[:1]:
        weight.grad = grad.float()
        made.step()
    state = made.state[weight]
    basis = state["basis"].float()
    low = basis.T @ grads[0].float()
    n = 0.1 * low / ((0.001 * low * low).sqrt() + 1e-6)
    phi = n.norm(dim=0) / (low.norm(dim=0) + 1e-8)
    outside = phi * (grads[0].float() - basis @ low)
    torch.testing.assert_close(state["residual_norm"], outside.norm(), rtol=1e-4, atol=0)


def test_alpha_and_scale_are_one_thing() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"alpha=0\.5 with scale=0\.25"):
        FiraAdamW([{"params": [weight], "rank": 2, "alpha": 0.5, "scale": 0.25}])
    group = FiraAdamW([{"params": [weight], "rank": 2, "alpha": 0.5}]).param_groups[0]
    assert group["scale"] == 0.5
    assert "alpha" not in group


def test_options_of_strategies_not_chosen_raise() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"limiter=None: accepted with .*residual='norm_scaled'"):
        GaLoreAdamW([{"params": [weight], "rank": 2, "limiter": None}])
    with pytest.raises(ValueError, match=r"limiter=None: accepted with .*residual='norm_scaled'"):
        GaLoreAdamW([{"params": [weight], "rank": 2}], limiter=None)
    with pytest.raises(ValueError, match=r"limiter=0\.5"):
        FiraAdamW([{"params": [weight], "rank": 2, "limiter": 0.5}])
    GaLoreAdamW([{"params": [weight], "rank": 2, "residual": "norm_scaled", "limiter": None}])
