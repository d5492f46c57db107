"""Alice, LDAdam, cosine bases and row-normalised residuals equal their plain fp64 references."""

from __future__ import annotations

from typing import Any

import pytest
import references_newer as references
import torch
from references import down, up
from references_beyond import Bases
from support import matrix, tiny_model
from torch import Tensor, nn

from lowrank.optimizers import AliceAdamW, FiraAdamW, GaLoreAdamW, LDAdamW, build, state_bytes
from lowrank.optimizers.projectors.dct import INDEX, choose, cosines
from lowrank.optimizers.projectors.switched import COVARIANCE
from lowrank.optimizers.residuals.error_feedback import ERROR

SHAPES = ((14, 9), (9, 14), (11, 11))


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2)) for k in range(steps)]


def start(shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(0.2 * matrix(*shape, 0))


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> list[Any]:
    """The state's tensors after each step."""
    kept = []
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
        state = made.state[weight]
        kept.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})
    return kept


def sided(basis: Tensor, shape: tuple[int, int], proj_type: str = "std") -> Bases:
    on_right = {"std": shape[0] >= shape[1], "left": False, "right": True}[proj_type]
    return (None, basis.double()) if on_right else (basis.double(), None)


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * 1e-2)


# Alice


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
@pytest.mark.parametrize("limiter", [1.01, None])
def test_alice(shape: tuple[int, int], proj_type: str, limiter: float | None) -> None:
    weight, grads = start(shape), gradients(shape)
    grads[7] = 4 * grads[7]
    before = weight.detach().clone()
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "proj_type": proj_type}
    made = AliceAdamW([{**group, "limiter": limiter}], lr=0.02, weight_decay=0.1)
    kept = train(made, weight, grads)
    expected = references.alice(
        grads,
        before,
        lambda k: sided(kept[k]["basis"], shape, proj_type),
        lr=0.02,
        limiter=limiter,
        weight_decay=0.1,
    )
    assert_close(weight.detach(), expected, 1e-9 if limiter is None else 1e-4)
    r, (m, n) = 4, shape
    short = {"std": min(shape), "left": m, "right": n}[proj_type]
    numbers = short * r + 2 * r * (m + n - short) + (m + n - short) + r * r
    assert state_bytes(made) == 8 * numbers + 4 + (0 if limiter is None else 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tracking", [True, False])
def test_leading_directions_are_those_of_the_tracked_gradients(
    shape: tuple[int, int], tracking: bool
) -> None:
    weight, grads = start(shape), gradients(shape)
    options = {"rank": 4, "update_proj_gap": 4, "leading_share": 0.5, "tracking_beta": 0.8}
    made = AliceAdamW([{"params": [weight], **options, "tracking": tracking}], lr=0.02)
    kept = train(made, weight, grads)
    tracked = torch.zeros(4, 4).double()
    for k, grad in enumerate(grads):
        lying = grad if shape[0] < shape[1] else grad.T
        basis = kept[k]["basis"]
        if k in (4, 8):
            old = kept[k - 1]["basis"]
            wanted = references.alice_basis(lying, old, tracked if tracking else None, 2, 0.8)
            signs = (wanted * basis[:, :2]).sum(0).sign()
            assert_close(basis[:, :2], wanted * signs, 1e-7)
            turn = basis.T @ old
            tracked = turn @ tracked @ turn.T
            assert float((basis[:, 2:] - old[:, 2:]).norm()) > 0.5  # others were drawn
        low = basis.T @ lying
        tracked = 0.8 * tracked + 0.2 * low @ low.T
        if tracking:
            assert_close(kept[k][COVARIANCE], tracked, 1e-7)
        else:
            assert COVARIANCE not in kept[k]
        assert_close(basis.T @ basis, torch.eye(4).double(), 1e-9)


def test_drawn_directions_differ_by_matrix_and_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model = tiny_model()
        made = build("alice_adamw", model, rank=4, update_proj_gap=2, seed=seed)
        for step in range(3):
            for param in model.parameters():
                param.grad = 1e-2 * matrix(1, param.numel(), step).view(param.shape).float()
            made.step()
        found.append(made.state[model.mlp["down_proj"].weight]["basis"].clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_column_inside_the_subspace_takes_no_step_outside_it() -> None:
    """Rounding errors are not magnified to the size of a step."""
    shape, weight = (9, 14), start((9, 14))
    weight = nn.Parameter(weight.detach().float())
    grads = [(matrix(9, 2, 1) @ matrix(2, 14, k + 2)).float() for k in range(6)]
    options = {"rank": 4, "residual": "column_scaled", "limiter": None, "update_proj_gap": 1}
    other = nn.Parameter(weight.detach().clone())
    made = GaLoreAdamW([{"params": [weight], **options}], lr=0.02)
    plain = GaLoreAdamW([{"params": [other], "rank": 4, "update_proj_gap": 1}], lr=0.02)
    train(made, weight, grads)
    train(plain, other, grads)
    assert float((weight - other).detach().abs().max()) < 0.02 * 0.02
    with pytest.raises(ValueError, match="proj_type='full' with residual='column_scaled'"):
        GaLoreAdamW(
            [{"params": [start(shape)], "rank": 4, "proj_type": "full"}], residual="column_scaled"
        )


# LDAdam


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_ldadam(feedback: bool, proj_type: str) -> None:
    shape = (9, 14)
    weight, grads = start(shape), gradients(shape)
    expected, error = references.ldadam(
        grads, weight, rank=4, lr=0.02, weight_decay=0.1, feedback=feedback
    )
    if proj_type == "right":  # the same on the transposes
        weight, grads = nn.Parameter(weight.detach().T.contiguous()), [g.T for g in grads]
        expected, error = expected.T, error.T
    options = {} if feedback else {"residual": "dropped"}
    made = LDAdamW(
        [{"params": [weight], "rank": 4, "proj_type": proj_type}],
        lr=0.02,
        weight_decay=0.1,
        refresh="svd",
        **options,
    )
    kept = train(made, weight, grads)
    assert_close(weight.detach(), expected, 1e-7)
    if feedback:
        assert_close(kept[-1][ERROR], error, 1e-7)
    m, n, r = 9, 14, 4
    assert state_bytes(made) == 8 * (m * r + 2 * n * r + (m * n if feedback else 0)) + 4


def test_nothing_is_lost_without_moments_in_the_way() -> None:
    """What is used and the error add up to the gradients, whatever the bases (b1 = 0)."""
    weight, grads = start((9, 14)), gradients((9, 14))
    made = LDAdamW([{"params": [weight], "rank": 3}], lr=0.0, betas=(0.0, 0.99))
    used, error = torch.zeros(9, 14).double(), torch.zeros(9, 14).double()
    for grad in grads:
        (kept,) = train(made, weight, [grad])
        used += grad + error - kept[ERROR]
        error = kept[ERROR]
        left = kept["basis"]
        assert float((left.T @ error).norm()) < 1e-12  # all of it is outside
    assert_close(used + error, sum(grads))


def test_the_users_gradient_is_left_alone_and_a_bad_one_leaves_the_error() -> None:
    weight, grads = start((9, 14)), gradients((9, 14), 4)
    made = LDAdamW([{"params": [weight], "rank": 3}], lr=0.01)
    kept = train(made, weight, grads[:2])
    assert weight.grad is not None
    assert torch.equal(weight.grad, grads[1])
    bad = grads[2].clone()
    bad[3, 4] = float("nan")
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match="non-finite gradient"):
        (after,) = train(made, weight, [bad])
    assert torch.equal(weight.detach(), before)
    assert torch.equal(after[ERROR], kept[-1][ERROR])
    train(made, weight, grads[3:])
    assert bool(weight.isfinite().all())


def test_moments_that_would_be_zero_at_each_step_raise() -> None:
    with pytest.raises(ValueError, match="moments='reset' with projector='block_power'"):
        LDAdamW([{"params": [start((9, 14))], "rank": 3}], moments="reset")


@pytest.mark.parametrize("method", [AliceAdamW, LDAdamW])
def test_another_side_and_rank_mid_training(method: type) -> None:
    """What belongs to columns is that of rows then; the error stays what it is."""
    weight, grads = start((9, 14)), gradients((9, 14))
    made = method([{"params": [weight], "rank": 3, "update_proj_gap": 1}], lr=0.01)
    train(made, weight, grads[:3])
    made.param_groups[0].update(proj_type="right", rank=4)
    kept = train(made, weight, grads[3:6])
    fresh = method([{"params": [start((9, 14))], "rank": 4, "proj_type": "right"}], lr=0.01)
    wanted = next(iter(fresh.state.values()))
    shapes = {key: value.shape for key, value in wanted.items() if isinstance(value, Tensor)}
    assert {key: kept[-1][key].shape for key in shapes} == shapes
    assert bool(weight.isfinite().all())


# Cosines


@pytest.mark.parametrize("size", [1, 7, 12, 4096])
def test_cosines_are_orthonormal(size: int) -> None:
    index = torch.arange(0, size, max(1, size // 12))
    basis = cosines(size, index, torch.float32)
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(index)), rtol=0, atol=2e-6)
    smooth = torch.linspace(0, 1, size, dtype=torch.float64)
    if size == 12:
        whole = cosines(size, torch.arange(size), torch.float64)
        assert float((whole[:, :4].T @ smooth).norm()) > 0.99 * float(smooth.norm())


def test_columns_that_stay_keep_their_place() -> None:
    sums = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0])
    assert choose(sums, 3, None).tolist() == [0, 2, 3]
    assert choose(sums, 3, torch.tensor([3, 1, 0])).tolist() == [3, 2, 0]
    assert choose(sums, 5, None).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_the_largest_columns_are_chosen(shape: tuple[int, int], proj_type: str) -> None:
    weight, grads = start(shape), gradients(shape)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "proj_type": proj_type}
    made = GaLoreAdamW([{**group, "projector": "dct"}], lr=0.02)
    kept = train(made, weight, grads)
    on_right = sided(torch.zeros(1), shape, proj_type)[0] is None
    size = shape[1] if on_right else shape[0]
    whole = cosines(size, torch.arange(size), torch.float64)
    w, m, v = start(shape).detach(), torch.zeros(()).double(), torch.zeros(()).double()
    for k, grad in enumerate(grads):
        index = kept[k]["basis" + INDEX].long()
        if k % 3 == 0:
            sums = (whole.T @ (grad.T if on_right else grad)).abs().sum(1)
            assert sorted(index.tolist()) == sorted(sums.topk(4).indices.tolist())
        bases = sided(whole[:, index], shape, proj_type)
        r = down(grad, *bases)
        m, v = references.adam_moments(r, m, v, (0.9, 0.999))
        size_ = 0.02 * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        w = w - size_ * 0.25 * up(m / (v.sqrt() + 1e-6), *bases)
    assert_close(weight.detach(), w, 1e-8)
    assert state_bytes(made) == 8 * 2 * 4 * (sum(shape) - size) + 4 * 4 + 4


def test_cosines_go_with_other_parts_and_not_with_a_stored_basis() -> None:
    weight = start((9, 14))
    made = FiraAdamW([{"params": [weight], "rank": 4, "projector": "dct", "moments": "rotate"}])
    train(made, weight, gradients((9, 14)))
    assert bool(weight.isfinite().all())
    with pytest.raises(ValueError, match="basis with projector='dct'"):
        GaLoreAdamW([{"params": [weight], "rank": 4}], projector="dct", basis="int8")


# Row-normalised residual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_row_normalised(shape: tuple[int, int], proj_type: str) -> None:
    weight, grads = start(shape), gradients(shape)
    w, m, v = weight.detach().clone(), torch.zeros(()).double(), torch.zeros(()).double()
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "proj_type": proj_type}
    made = GaLoreAdamW([{**group, "residual": "row_normalised", "inactive_lr_scale": 0.5}], lr=0.02)
    kept = train(made, weight, grads)
    for k, grad in enumerate(grads):
        bases = sided(kept[k]["basis"], shape, proj_type)
        r = down(grad, *bases)
        m, v = references.adam_moments(r, m, v, (0.9, 0.999))
        size = 0.02 * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
        outside = references.normalised(grad - up(r, *bases), 1, 0.0)
        w = w - 0.25 * (size * up(m / (v.sqrt() + 1e-6), *bases) + 0.02 * 0.5 * outside)
    assert_close(weight.detach(), w, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_inside_the_subspace_take_no_normalised_step(dtype: torch.dtype) -> None:
    """Rounding errors would become steps of full size."""
    weight = nn.Parameter(start((9, 14)).detach().to(dtype))
    other = nn.Parameter(weight.detach().clone())
    grads = [matrix(9, 2, 1) @ matrix(2, 14, k + 2) for k in range(4)]
    options = {"rank": 4, "update_proj_gap": 1, "proj_type": "right"}
    train(GaLoreAdamW([{"params": [weight], **options}], residual="row_normalised"), weight, grads)
    train(GaLoreAdamW([{"params": [other], **options}]), other, grads)
    if dtype == torch.float32:
        assert torch.equal(weight, other)
    else:
        # bf16 bases are orthonormal to half a percent, which is outside the subspace.
        assert float((weight - other).detach().abs().max()) < 5e-3
