"""What becomes of the moments when the subspace moves, and who quantises them."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import references
import torch
from support import hashed, matrix
from torch import Tensor, nn

from lowrank.optimizers import (
    AdamW8bit,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreMuon,
    GaLorePlusAdamW,
    LowRankOptimizer,
)

SHAPES = ((14, 9), (9, 14), (11, 11))
BETAS = (0.9, 0.999)


def gradients(shape: tuple[int, int], steps: int = 9) -> list[Tensor]:
    return [1e-2 * (0.4 * matrix(*shape, 1) + matrix(*shape, k + 2)) for k in range(steps)]


def run(made: LowRankOptimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


def moved(m: Tensor, v: Tensor, how: str, left: Tensor | None, right: Tensor | None, k: int) -> Any:
    """Moments in the new bases; left and right are new^T old."""

    def carry(low: Tensor, square: bool = False) -> Tensor:
        for side, matrix_rr in (("left", left), ("right", right)):
            if matrix_rr is not None:
                c = matrix_rr.square() if square else matrix_rr
                low = c @ low if side == "left" else low @ c.T
        return low

    if how == "keep":
        return m, v
    if how == "reset":
        return 0 * m, 0 * v
    if how == "restore":
        return carry(m), carry(v.sqrt()).square()
    c1, c2 = 1 - BETAS[0] ** k, 1 - BETAS[1] ** k
    new_m = carry(m)
    new_v = carry(v / c2 - (m / c1).square(), square=True) + (new_m / c1).square()
    return new_m, (c2 * new_v).abs()


def overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None or old is None else new.T @ old


def galore(
    grads: list[Tensor], weight: Tensor, *, rank: int, gap: int, how: str, proj_type: str
) -> Tensor:
    w = weight.double().clone()
    m = v = torch.zeros((), dtype=torch.float64)
    left = right = None
    since = 0
    for k, g in enumerate(grads):
        if k % gap == 0:
            old = left, right
            left, right = references.galore_bases(g, rank, proj_type)
            if k:
                m, v = moved(m, v, how, overlap(left, old[0]), overlap(right, old[1]), k)
            since = k if how == "reset" else 0
        r = references.down(g, left, right)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r * r
        t = k + 1 - since
        size = 0.02 * (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t)
        w = w - size * 0.5 * references.up(m / (v.sqrt() + 1e-6), left, right)
    return w


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
@pytest.mark.parametrize("how", ["keep", "reset", "restore", "rotate"])
def test_moments_follow_the_subspace(shape: tuple[int, int], proj_type: str, how: str) -> None:
    start, grads = 0.2 * matrix(*shape, 0), gradients(shape)
    expected = galore(grads, start, rank=4, gap=3, how=how, proj_type=proj_type)
    for foreach in (None, True, False):
        weight = nn.Parameter(start.clone())
        group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "scale": 0.5}
        made = GaLoreAdamW(
            [{**group, "proj_type": proj_type, "moments": how}],
            lr=0.02,
            refresh="svd",
            foreach=foreach,
        )
        torch.testing.assert_close(run(made, weight, grads), expected, rtol=1e-9, atol=1e-11)


def test_rotation_within_one_subspace_is_exact_for_the_mean() -> None:
    """Signs and order of the basis change nothing but coordinates: the update stays the same."""
    shape = (9, 14)
    grads = gradients(shape)
    results = []
    for gap in (3, 1000):
        weight = nn.Parameter(0.2 * matrix(*shape, 0))
        group = {"params": [weight], "rank": 99, "update_proj_gap": gap, "moments": "restore"}
        made = GaLoreMuon([group], lr=0.02, refresh="svd", nesterov=False)
        results.append(run(made, weight, grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["reset", "restore", "rotate"])
def test_8bit_moments_move_alike(how: str) -> None:
    shape = (40, 64)
    results = []
    for cls, options in ((GaLoreAdamW8bit, {"min_8bit_size": 0, "weight_decay": 0.0}), (None, {})):
        weight = nn.Parameter((0.2 * matrix(*shape, 0)).float())
        group = {"params": [weight], "rank": 16, "update_proj_gap": 3, "scale": 0.5, "moments": how}
        made = (cls or GaLoreAdamW)([group], lr=0.02, **options)
        results.append(run(made, weight, gradients(shape)))
    start = (0.2 * matrix(*shape, 0)).float()
    assert (results[0] - results[1]).norm() < 0.1 * (results[1] - start).norm()


@pytest.mark.parametrize("how", ["reset", "restore"])
def test_adafactors_first_moment_moves(how: str) -> None:
    shape = (9, 14)
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape, steps=4)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "moments": how}
    made = GaLoreAdafactor([group], lr=0.02, beta1=0.9, refresh="svd")
    run(made, weight, grads[:3])
    state = copy.deepcopy(made.state[weight])
    run(made, weight, grads[3:])
    if how == "restore":
        before = made.state[weight]["basis"].T @ state["basis"] @ state["exp_avg"]
    else:
        before = torch.zeros_like(state["exp_avg"])
    low = made.state[weight]["basis"].T @ grads[3]
    innovation = made.state[weight]["exp_avg"] - 0.9 * before
    # what is left is the normalised projection: same signs as the projected gradient
    assert torch.equal(innovation.sign(), low.sign())


def test_moves_that_a_rule_cannot_follow_raise() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"moments='rotate': .*Adafactor accept 'keep', 'reset'"):
        GaLoreAdafactor([{"params": [weight], "rank": 2, "moments": "rotate"}], lr=0.1)
    with pytest.raises(ValueError, match=r"moments='turn'.*'rotate'"):
        GaLoreAdamW([{"params": [weight], "rank": 2, "moments": "turn"}])
    with pytest.raises(ValueError, match="moments='reset' with capturable=True"):
        GaLoreAdamW([{"params": [weight], "rank": 2, "moments": "reset"}], capturable=True)


def test_reset_counts_from_each_matrix_own_refresh_when_staggered() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 8)) for _ in range(3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    group = {"rank": 3, "update_proj_gap": 4, "moments": "reset", "stagger": True}
    together = GaLoreAdamW([{"params": params, **group}], foreach=True)
    single = GaLoreAdamW([{"params": twins, **group}], foreach=False)
    for step in range(10):
        for index, pair in enumerate(zip(params, twins, strict=True)):
            for param in pair:
                param.grad = hashed(48, 10 * step + index).reshape(6, 8).float()
        together.step()
        single.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fit_on", ["one", "all"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_heads_share_a_basis(fit_on: str, dtype: str | None) -> None:
    shape, heads, each = (12, 10), 3, 2
    weight, grads = nn.Parameter((0.2 * matrix(*shape, 0)).float()), gradients(shape, steps=6)
    group = {"params": [weight], "rank": heads * each + 1, "heads": heads, "fit_on": fit_on}
    made = GaLorePlusAdamW(
        [{**group, "projector": "cross_head", "update_proj_gap": 99, "scale": 0.5}],
        lr=0.02,
        projection_dtype=dtype,
        refresh="svd",
    )
    run(made, weight, grads)
    state = made.state[weight]
    assert state["basis"].shape == (4, each)
    assert state["exp_avg"].shape == (heads * each, 10)
    blocks = grads[0].float().reshape(heads, 4, 10)
    candidates = blocks if fit_on == "one" else [torch.cat(list(blocks), dim=1)]
    spans = [torch.linalg.svd(block, full_matrices=False).U[:, :each] for block in candidates]
    kept = [(span.T @ state["basis"]).square().sum().item() for span in spans]
    assert max(kept) == pytest.approx(each, abs=1e-4)  # the same span
    wide = torch.block_diag(*[state["basis"]] * heads).double()
    w = (0.2 * matrix(*shape, 0)).float().double()
    m = v = torch.zeros((), dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        r = wide.T @ g.float().double()
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        size = 0.02 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        w = w - 0.5 * size * wide @ (m / (v.sqrt() + 1e-6))
    error = (weight.detach() - w).norm() / (w - 0.2 * matrix(*shape, 0)).norm()
    assert error < (1e-5 if dtype is None else 2e-2)


def test_heads_that_do_not_divide_raise() -> None:
    weight = nn.Parameter(torch.zeros(12, 10))
    group = {"params": [weight], "rank": 2, "projector": "cross_head"}
    with pytest.raises(ValueError, match=r"heads=5 for a matrix of 12 x 10"):
        GaLorePlusAdamW([{**group, "heads": 5}])
    with pytest.raises(ValueError, match="heads=None"):
        GaLorePlusAdamW([group])


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
def test_bitsandbytes_states_are_ours() -> None:
    """The same codes but for ties, and states that can be handed over."""
    shape = (40, 64)
    pair = []
    for quantizer in ("native", "bitsandbytes"):
        weight = nn.Parameter((0.2 * matrix(*shape, 0)).float())
        made = AdamW8bit([weight], lr=0.01, quantizer=quantizer, min_8bit_size=0)
        run(made, weight, gradients(shape))
        pair.append((weight, made))
    (ours, first), (theirs, second) = pair
    # a moment in the middle between two codes may take either
    start = (0.2 * matrix(*shape, 0)).float()
    assert (ours - theirs).norm() < 5e-3 * (theirs - start).norm()
    for key in ("exp_avg", "exp_avg_sq"):
        same = (first.state[ours][key] == second.state[theirs][key]).float().mean()
        assert same > 0.98
    saved = copy.deepcopy(first.state_dict())
    for group in saved["param_groups"]:
        group["quantizer"] = "bitsandbytes"
    second.load_state_dict(saved)
    run(second, theirs, gradients(shape, steps=1))


def test_quantizers_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"quantizer='best'.*'bitsandbytes'"):
        AdamW8bit([weight], quantizer="best")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lowrank-pretrain\[bnb\]"):
        AdamW8bit([weight], quantizer="bitsandbytes")
