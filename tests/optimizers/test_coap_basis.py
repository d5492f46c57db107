"""COAP's basis: closed form against autograd, its cost, and steps that fail or are missed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import references_coap
import torch
from support import hashed, matrix
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lowrank.optimizers import CoapAdamW
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.projectors.correlation import correlation_gradient, correlation_step


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
    expected = references_coap.gradient(grad, basis, chosen, side)
    assert distance(correlation_gradient(grad, basis, chosen, side), expected) < 1e-12
    normalised = correlation_gradient(grad, basis, chosen, side, normalize=True)
    size = (shape[0] * shape[1]) ** 0.5 / grad.norm()
    moved = None if chosen is None else size * chosen
    assert distance(normalised, references_coap.gradient(size * grad, basis, moved, side)) < 1e-12


def distance(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def test_rows_without_moment_or_gradient_are_finite() -> None:
    for side in (Side.LEFT, Side.RIGHT):
        grad, basis, moment = problem((14, 9), side)
        grad[3] = 0
        if side is Side.RIGHT:
            moment[5] = 0
        expected = references_coap.gradient(grad, basis, moment, side)
        result = correlation_gradient(grad, basis, moment, side)
        assert result.isfinite().all()
        assert distance(result, expected) < 1e-12


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


def allocations(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of the largest allocation, and of the most that was held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    largest = held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            largest, most = max(largest, event.nbytes()), max(most, held)
    return largest, most


@pytest.mark.parametrize("shape", [(1024, 768), (768, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"normalize_gradient": True}, {"factor": 1}], ids=str)
def test_no_refresh_makes_a_temporary_of_the_gradients_size(
    shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """P steps (normalised or not) and re-projections, within a whole step of the optimizer."""
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    group = {"params": [weight], "rank": 32, "update_interval": 1}
    factor = options.get("factor", 9)
    normalize = options.get("normalize_gradient", False)
    made = CoapAdamW([group], reproject_factor=factor, normalize_gradient=normalize)
    weight.grad = matrix(*shape, 1).to(dtype)
    made.step()
    largest, most = allocations(made.step)
    # Chunks of rows have at most 2^18 entries in fp32; a copy in fp32 would have three times more.
    assert largest <= (1 << 18) * 4
    assert largest < weight.nbytes
    if options.get("factor") == 1:
        assert most < weight.numel() * 4


@pytest.mark.parametrize("shape", [(1024, 768), (768, 1024)], ids=str)
@pytest.mark.parametrize("rank", [16, 64])
def test_a_p_step_costs_6mnr(shape: tuple[int, int], rank: int) -> None:
    side = Side.RIGHT if shape[0] >= shape[1] else Side.LEFT
    grad, basis, moment = problem(shape, side, rank)
    with FlopCounterMode(display=False) as counter:
        correlation_step(grad, basis, moment, side, 0.1)
    count = math.prod(shape) * rank
    beside = sum(shape) * rank**2  # of products of small factors
    assert 6 * count <= counter.get_total_flops() <= 6 * count + 6 * beside


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (40, 32, 3, 3)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size", "normalize"),
    [
        (torch.float32, 4e18, False),
        (torch.float32, 1e-30, True),
        (torch.bfloat16, 4e18, False),
    ],
)
def test_a_step_that_overflows_keeps_the_basis(
    shape: tuple[int, ...], dtype: torch.dtype, size: float, normalize: bool
) -> None:
    weight = nn.Parameter(hashed(math.prod(shape), 0).reshape(shape).to(dtype))
    sizes = {"rank": 8} if len(shape) == 2 else {"rank_ratio_cnn": 2.0}
    group = {"params": [weight], "update_interval": 2, "reproject_factor": 2, **sizes}
    made = CoapAdamW([group], lr=1e-2, normalize_gradient=normalize)
    state = made.state[weight]

    def step(k: int, scale: float) -> None:
        weight.grad = (hashed(weight.numel(), k + 1).reshape(shape) * scale).to(dtype)
        made.step()

    for k in range(2):
        step(k, 1e-2)
    former = state["basis"].clone()
    with pytest.warns(UserWarning, match="overflowed at step 2"):
        step(2, size)
    assert torch.equal(state["basis"], former)
    assert state["refreshed_at"] == 0
    for k in range(3, 6):
        before = weight.detach().clone()
        step(k, 1e-2)
    assert not torch.equal(weight.detach(), before)
    assert state["refreshed_at"] == 4
    assert not torch.equal(state["basis"], former)


@pytest.mark.parametrize("missed", [2, 4])
def test_a_missed_change_of_the_basis_is_made_up_for(missed: int) -> None:
    """A P step (after 2) or a re-projection (after 4), at the next step that has a gradient."""
    weight = nn.Parameter(matrix(14, 9, 0))
    group = {"params": [weight], "rank": 4, "update_interval": 2, "reproject_factor": 2}
    made = CoapAdamW([group], lr=1e-2)
    state = made.state[weight]
    for k in range(missed + 1):
        weight.grad = matrix(14, 9, k + 1) * (0.0 if k == missed else 1.0)
        made.step()
    former, moment = state["basis"].clone(), state["exp_avg"].clone()
    assert state["refreshed_at"] == missed - 2
    weight.grad = matrix(14, 9, 20)
    made.step()
    assert state["refreshed_at"] == missed + 1
    if missed == 2:
        expected = correlation_step(weight.grad, former, moment, Side.RIGHT, 0.1)
        torch.testing.assert_close(state["basis"], expected)
    else:
        gram = state["basis"].T @ state["basis"]
        torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(("refresh", "depends"), [("svd", False), ("eigh", True)])
def test_the_first_sketch(refresh: str, depends: bool) -> None:
    """The released code's has a seed of its own, which "svd" reproduces."""
    bases = []
    for seed in range(2):
        weight = nn.Parameter(torch.zeros(9, 14, dtype=torch.float64))
        made = CoapAdamW([{"params": [weight], "rank": 3, "seed": seed}], refresh=refresh)
        weight.grad = matrix(9, 14, 1)
        made.step()
        bases.append(made.state[weight]["basis"])
    projectors = [basis @ basis.mT for basis in bases]
    assert torch.allclose(*projectors, rtol=0, atol=1e-6) != depends
