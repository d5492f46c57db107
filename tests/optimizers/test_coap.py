"""COAP: golden rows, closed form against autograd, the written-out rule, convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from support import matrix, tiny_model
from test_golden import golden_run
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from lowrank.optimizers import (
    CoapAdafactor,
    CoapAdafactor8bit,
    CoapAdamW,
    CoapAdamW8bit,
    build,
)
from lowrank.optimizers.projectors import Side
from lowrank.optimizers.projectors.correlation import correlation_gradient, correlation_step

# shape, update_interval, reproject_factor, large gradients, restore_state, expected
ROWS = (
    ((12, 8), 1000, 5, False, False, (-3.783335e-02, 7.001136e-02, 7.084429e-03, 1.759864e-03)),
    ((8, 12), 1000, 5, False, False, (-8.955672e-02, 7.189367e-02, -5.266927e-03, -1.432158e-03)),
    ((12, 8), 2, 1, False, False, (-1.502431e-02, 4.378957e-02, 3.195897e-03, 1.319684e-03)),
    ((12, 8), 2, 5, True, False, (-3.791076e-02, 7.048775e-02, 7.164121e-03, 1.813911e-03)),
    ((12, 8), 2, 5, True, True, (-3.793675e-02, 7.048117e-02, 7.163525e-03, 1.813099e-03)),
    ((8, 12), 2, 5, True, False, (-9.080803e-02, 7.207255e-02, -4.841618e-03, -1.408979e-03)),
)
ADAFACTOR_ROWS = (
    ((12, 8), (-1.211450e-02, 2.235215e-02, 2.015583e-03, -7.268414e-04)),
    ((8, 12), (-4.157358e-02, 2.349104e-02, -1.791202e-03, -1.629524e-03)),
)


@pytest.mark.parametrize(("shape", "interval", "factor", "large", "restore", "expected"), ROWS)
def test_adamw_golden_rows(
    shape: tuple[int, int],
    interval: int,
    factor: int,
    large: bool,
    restore: bool,
    expected: tuple[float, ...],
) -> None:
    group = {
        "update_interval": interval,
        "reproject_factor": factor,
        "restore_state": restore,
        "scale": 0.25,
    }
    result = golden_run(CoapAdamW, shape, group, size=1.0 if large else 1e-2)
    assert result == pytest.approx(expected, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize(("shape", "expected"), ADAFACTOR_ROWS)
def test_adafactor_golden_rows(shape: tuple[int, int], expected: tuple[float, ...]) -> None:
    group = {"update_interval": 2, "reproject_factor": 5, "scale": 0.25}
    result = golden_run(CoapAdafactor, shape, group, size=1.0, beta1=0.9, scale_parameter=False)
    assert result == pytest.approx(expected, rel=1e-5, abs=3e-7)


def by_autograd(grad: Tensor, basis: Tensor, moment: Tensor | None, side: Side) -> Tensor:
    leaf = basis.clone().requires_grad_()
    if side is Side.RIGHT:
        rebuilt = grad @ leaf @ leaf.T
        moved = None if moment is None else moment @ leaf.T
    else:
        rebuilt = leaf @ (leaf.T @ grad)
        moved = None if moment is None else leaf @ moment
    loss = functional.mse_loss(rebuilt, grad)
    if moved is not None:
        loss = loss * (1 - functional.cosine_similarity(moved, grad, dim=1).mean())
    return torch.autograd.grad(loss, leaf)[0]


def problem(shape: tuple[int, int], side: Side, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    m, n = shape
    grad = matrix(m, n, 1)
    size = n if side is Side.RIGHT else m
    # not orthonormal, as after some steps
    basis = torch.linalg.qr(matrix(size, rank, 2)).Q + 0.1 * matrix(size, rank, 3)
    low = (m, rank) if side is Side.RIGHT else (rank, n)
    return grad, basis, matrix(*low, 4)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (11, 11)], ids=str)
@pytest.mark.parametrize("side", [Side.LEFT, Side.RIGHT], ids=str)
@pytest.mark.parametrize("with_moment", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=str)
def test_closed_form_equals_autograd(
    shape: tuple[int, int], side: Side, with_moment: bool, scale: float
) -> None:
    grad, basis, moment = problem(shape, side)
    grad = scale * grad
    chosen = moment if with_moment else None
    expected = by_autograd(grad, basis, chosen, side)
    result = correlation_gradient(grad, basis, chosen, side)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12 * scale**2)
    normalised = correlation_gradient(grad, basis, chosen, side, normalize=True)
    factor = shape[0] * shape[1] / grad.square().sum()
    torch.testing.assert_close(normalised, expected * factor, rtol=1e-9, atol=1e-12)


def test_rows_without_moment_or_gradient_are_finite() -> None:
    for side in (Side.LEFT, Side.RIGHT):
        grad, basis, moment = problem((14, 9), side)
        grad[3] = 0
        if side is Side.RIGHT:
            moment[5] = 0
        expected = by_autograd(grad, basis, moment, side)
        result = correlation_gradient(grad, basis, moment, side)
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)


def test_normalised_step_moves_the_basis_at_any_gradient_scale() -> None:
    """The official step is a no-op at language models' gradient scale."""
    grad, basis, moment = problem((40, 30), Side.RIGHT)
    moves = {}
    for normalize in (False, True):
        for scale in (1.0, 1e-4):
            moved = correlation_step(
                scale * grad, basis, scale * moment, Side.RIGHT, 0.1, normalize=normalize
            )
            moves[normalize, scale] = ((moved - basis).norm() / basis.norm()).item()
    assert moves[False, 1e-4] < 1e-9
    assert moves[True, 1e-4] == pytest.approx(moves[True, 1.0], rel=1e-3)
    assert moves[True, 1e-4] > 1e-3


def coap(
    grads: list[Tensor], weight: Tensor, *, rank: int, interval: int, factor: int, restore: bool
) -> Tensor:
    """Written out with whole matrices, right or left by shape; big gradients make P move."""
    w, p = weight.clone(), None
    right = w.shape[0] >= w.shape[1]
    m = v = torch.zeros((), dtype=w.dtype)
    for k, g in enumerate(grads):
        tall = g if right else g.T
        old = p
        if k % (interval * factor) == 0:
            generator = torch.Generator().manual_seed(3407)
            omega = torch.randn(tall.shape[1], rank, generator=generator) if p is None else p
            q = torch.linalg.qr(tall @ omega.to(tall.dtype)).Q
            p = torch.linalg.svd(q.T @ tall, full_matrices=False).Vh.T
        elif k % interval == 0:
            step = by_autograd(g, p, m, Side.RIGHT if right else Side.LEFT)
            p = p - 0.1 * step * min(1.0, 1.0 / (step.norm().item() + 1e-6))
        left_p, right_p = (None, p) if right else (p, None)
        if restore and old is not None and k % interval == 0:
            old_pair = (None, old) if right else (old, None)
            m = references.down(references.up(m, *old_pair), left_p, right_p)
            v = references.down(references.up(v.sqrt(), *old_pair), left_p, right_p).square()
        r = references.down(g, left_p, right_p)
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        size = 0.02 * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        w = w - size * 0.5 * references.up(m / (v.sqrt() + 1e-6), left_p, right_p)
    return w


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (11, 11)], ids=str)
@pytest.mark.parametrize("restore", [False, True])
def test_the_written_out_rule(shape: tuple[int, int], restore: bool) -> None:
    grads = [matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2) for k in range(14)]
    weight = nn.Parameter(0.2 * matrix(*shape, 0))
    expected = coap(grads, weight.detach(), rank=4, interval=2, factor=3, restore=restore)
    group = {"params": [weight], "rank": 4, "scale": 0.5, "restore_state": restore}
    made = CoapAdamW(
        [{**group, "update_interval": 2, "reproject_factor": 3}], lr=0.02, refresh="svd"
    )
    for grad in grads:
        weight.grad = grad.clone()
        made.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(1024, 768), (768, 1024)], ids=str)
def test_a_p_step_makes_no_temporary_of_the_gradients_size(shape: tuple[int, int]) -> None:
    side = Side.RIGHT if shape[0] >= shape[1] else Side.LEFT
    grad, basis, moment = (t.float() for t in problem(shape, side, rank=32))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        correlation_step(grad, basis, moment, side, 0.1)
    events = record.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest < grad.nbytes // 4


def test_official_keywords_sort_parameters() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(40, 16),
            "small": nn.Linear(8, 8),
            "conv": nn.Conv2d(32, 48, 3),
            "tiny": nn.Conv2d(4, 4, 3),
        }
    )
    made = CoapAdamW(
        params=model.parameters(), rank=8, rank_ratio_cnn=2.0, update_interval=4, restore_state=True
    )
    shapes = [[tuple(p.shape) for p in group["params"]] for group in made.param_groups]
    assert shapes[1] == [(40, 16)]
    assert shapes[2] == [(48, 32, 3, 3)]
    assert (8, 8) in shapes[0]
    assert (4, 4, 3, 3) in shapes[0]
    for group in made.param_groups[1:]:
        assert (group["update_proj_gap"], group["moments"]) == (4, "restore")
        assert group["scale"] == 1.0
    grouped = [{"params": [nn.Parameter(torch.zeros(9, 6))], "rank_ratio_matrix": 2}]
    other = CoapAdafactor(grouped_params_with_proj=grouped)
    assert next(iter(other.state.values()))["basis"].shape == (6, 3)
    with pytest.raises(ValueError, match="exactly one"):
        CoapAdamW()
    with pytest.raises(ValueError, match="restore_state=True with moments='reset'"):
        CoapAdamW(
            [{"params": grouped[0]["params"], "rank": 2}], restore_state=True, moments="reset"
        )
    with pytest.raises(ValueError, match="proj_method='svd'"):
        CoapAdamW([{"params": grouped[0]["params"], "rank": 2, "proj_method": "svd"}])


def test_build_takes_either_name_of_the_interval() -> None:
    for options in ({"update_interval": 7}, {"update_proj_gap": 7}):
        made = build("coap_adamw", tiny_model(), rank=4, **options)
        assert made.param_groups[0]["update_proj_gap"] == 7
        assert made.param_groups[0]["scale"] == 0.25
    assert build("coap_adamw", tiny_model()).param_groups[0]["update_proj_gap"] == 32
    with pytest.raises(ValueError, match="two names"):
        build("coap_adamw", tiny_model(), update_interval=7, update_proj_gap=7)


def test_adafactor_without_a_first_moment_trains() -> None:
    weight = nn.Parameter(0.2 * matrix(14, 9, 0))
    made = CoapAdafactor([{"params": [weight], "rank": 4, "update_interval": 2}], lr=0.01)
    for k in range(5):
        weight.grad = matrix(14, 9, k + 1)
        made.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("pair", [(CoapAdamW8bit, CoapAdamW), (CoapAdafactor8bit, CoapAdafactor)])
def test_8bit_follows(pair: tuple[Any, Any]) -> None:
    shape, results = (48, 40), []
    start = (0.2 * matrix(*shape, 0)).float()
    for cls, options in zip(pair, ({"min_8bit_size": 0}, {}), strict=True):
        if issubclass(cls, CoapAdafactor):
            options = {**options, "beta1": 0.9, "scale_parameter": False}
        weight = nn.Parameter(start.clone())
        group = {"params": [weight], "rank": 16, "update_interval": 2}
        made = cls([group], lr=0.01, **options)
        for k in range(8):
            weight.grad = (1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2))).float()
            made.step()
        results.append(weight.detach())
    assert (results[0] - results[1]).norm() < 0.05 * (results[1] - start).norm()
