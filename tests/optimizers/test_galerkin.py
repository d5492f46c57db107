"""DLRT equals a plain fp64 reference of its rule; its layer, ranks, and what wrong use does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from references import adam
from support import matrix, tiny_model
from table import assert_same
from torch import Tensor, nn

from lowrank.optimizers import DLRTAdamW, build, convert, merge, param_groups, state_bytes
from lowrank.optimizers.layers.galerkin import GalerkinLinear

M, N, R = 14, 10, 3


def model_of(rank: int = R, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(N, M)}).to(dtype)
    return model, build("dlrt_adamw", model, rank=rank, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return matrix(12, N, 3 * step + 1), matrix(12, M, 3 * step + 2)


def backward(model: Any, step: int) -> Tensor:
    """The loss <y, t>: its gradient of W is t^T x, whatever W is."""
    x, t = batch(step)
    model.zero_grad()
    loss: Tensor = (model["attn"](x.to(model["attn"].dtype)) * t).sum()
    loss.backward()
    return t.T @ x


def orthonormal(kept: Tensor, fresh: Tensor, width: int) -> Tensor:
    """Gram and Schmidt, twice for precision, until `width` columns are there."""
    columns = list(kept.T)
    for column in fresh.T:
        for _ in range(2):
            for own in columns:
                column = column - own * (own @ column)
            column = column / column.norm()
        columns.append(column)
    return torch.stack(columns[:width], 1)


def reference(layer: GalerkinLinear, steps: int, gap: int, tolerance: float) -> tuple[Tensor, Any]:
    """W after some steps of Galerkin and basis updates, and the ranks."""
    s, u, v = (p.detach().double().clone() for p in (layer.core, layer.left, layer.right))
    width, ranks, grads = len(s), [], []
    since = s
    for step in range(steps):
        x, t = batch(step)
        g = t.T @ x
        grads.append(u.T @ g @ v)
        s = adam(grads, since, lr=0.02, eps=1e-8, weight_decay=0.0, torch_form=True)
        if (step + 1) % gap:
            continue
        p, d, qh = torch.linalg.svd(s)
        errors = [float(d[k:].norm() / d.norm()) for k in range(len(d))]
        kept = next((k for k in range(1, R) if errors[k] <= tolerance), R)
        ranks.append(kept)
        w = u @ (p[:, :kept] * d[:kept]) @ qh[:kept] @ v.T
        k_step, l_step = g @ v @ qh.T, g.T @ u @ p
        u, v = (
            orthonormal(u @ p[:, :kept], k_step, width),
            orthonormal(v @ qh[:kept].T, l_step, width),
        )
        s = u.T @ w @ v
        since, grads = s, []
    return u @ s @ v.T, ranks


@pytest.mark.parametrize("tolerance", [0.0, 0.6])
def test_equals_the_reference(tolerance: float) -> None:
    model, optimizer = model_of(lr=0.02, update_proj_gap=3, tolerance=tolerance)
    layer = model["attn"]
    expected, ranks = reference(layer, 10, 3, tolerance)
    found, events = [], []
    optimizer.register_event_hook(lambda event: events.append(event))
    for step in range(10):
        backward(model, step)
        optimizer.step()
        if (step + 1) % 3 == 0:
            found.append(int(layer.kept))
    assert found == ranks
    assert (tolerance == 0.0) is (ranks == [R] * 3)
    torch.testing.assert_close(layer.effective_weight(), expected, rtol=1e-7, atol=1e-9)
    assert [(event.kind, event.step, event.layers) for event in events] == [
        ("truncate", step, 1) for step in (3, 6, 9)
    ]
    assert all(0 < event.change < 1 for event in events)


def test_gradients_are_those_of_the_basis_updates() -> None:
    model, _ = model_of()
    layer = model["attn"]
    g = backward(model, 0)
    u, v = layer.left.detach(), layer.right.detach()
    torch.testing.assert_close(layer.core.grad, u.T @ g @ v)
    torch.testing.assert_close(layer.left.grad, g @ v)
    torch.testing.assert_close(layer.right.grad, g.T @ u)
    x, t = (part.requires_grad_() for part in batch(1))
    layer(x).backward(t)
    torch.testing.assert_close(x.grad, t @ layer.effective_weight())
    torch.testing.assert_close(layer.bias.grad, batch(0)[1].sum(0) + t.sum(0))


def test_a_basis_update_keeps_a_weight_of_low_rank_and_takes_up_the_gradient() -> None:
    model, _ = model_of()
    layer = model["attn"]
    before = layer.effective_weight()
    assert torch.linalg.matrix_rank(before) == R
    g = backward(model, 0)
    change = layer.update_bases(layer.left.grad, layer.right.grad, 0.0)
    assert change == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(layer.effective_weight(), before)
    for basis in (layer.left, layer.right):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(2 * R).double())
    # The best step in the new bases follows the gradient further than in the old ones.
    inside = (layer.left.mT @ g @ layer.right).norm() / g.norm()
    old, _ = model_of()
    assert inside > (old["attn"].left.mT @ g @ old["attn"].right).norm() / g.norm()


def test_the_only_state_is_that_of_the_cores() -> None:
    _, optimizer = model_of(dtype=torch.float32)
    assert state_bytes(optimizer) == 4 * 4 + 2 * 4 * ((2 * R) ** 2 + M)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_puts_a_basis_update_off(bad: float) -> None:
    model, optimizer = model_of(update_proj_gap=2)
    layer = model["attn"]
    events: list[int] = []
    optimizer.register_event_hook(lambda event: events.append(event.step))
    for step in range(4):
        backward(model, step)
        if step == 1:
            layer.left.grad[0, 0] = bad
        before = layer.left.detach().clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            optimizer.step()
        if step == 1:
            assert torch.equal(before, layer.left)
    assert events == [3, 4]
    assert layer.effective_weight().isfinite().all()


def test_resumes_exactly() -> None:
    straight, first = model_of(update_proj_gap=3)
    model, optimizer = model_of(update_proj_gap=3)
    for step in range(8):
        backward(straight, step)
        first.step()
    for step in range(5):
        backward(model, step)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, other = model_of(update_proj_gap=3)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for step in range(5, 8):
        backward(again, step)
        other.step()
    assert_same(again, straight)
    assert int(again["attn"].kept) == int(straight["attn"].kept)


def test_ranks_beyond_the_matrix_are_clamped() -> None:
    model, optimizer = model_of(rank=99, update_proj_gap=1)
    layer = model["attn"]
    assert layer.core.shape == (N, N)
    torch.manual_seed(0)
    dense = nn.Linear(N, M).double().weight
    torch.testing.assert_close(layer.effective_weight(), dense.detach())
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert layer.left.shape == (M, N)
    assert layer.effective_weight().isfinite().all()


def test_a_run_without_a_basis_update_warns() -> None:
    _, optimizer = model_of(update_proj_gap=20)
    optimizer.warn_of_length(21)
    with pytest.warns(UserWarning, match="update_proj_gap=20 in a run of 20 steps"):
        optimizer.warn_of_length(20)


def test_merging_makes_it_dense() -> None:
    model = convert("dlrt_adamw", tiny_model(), rank=4)
    tokens = torch.arange(12).reshape(3, 4)
    before = model(tokens)
    torch.testing.assert_close(merge(model)(tokens), before)
    assert not any(isinstance(module, GalerkinLinear) for module in model.modules())


def test_groups_that_would_train_bases_are_refused() -> None:
    model, _ = model_of()
    with pytest.raises(ValueError, match="core=None"):
        DLRTAdamW(param_groups(model))
    groups = [{**group, "core": True} for group in param_groups(model) if group.get("factors")]
    with pytest.raises(ValueError, match="is in a parameter group with core=True"):
        DLRTAdamW(groups).attach(model)
    with pytest.raises(ValueError, match="tolerance=1"):
        model_of(tolerance=1.0)
