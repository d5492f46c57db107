"""Online Subspace Descent: golden rows, the closed form against autograd, and its options."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import references_beyond
import torch
from support import matrix, tiny_model
from test_golden import golden_run
from torch import Tensor, nn

from lowrank.optimizers import (
    GaLoreAdamW,
    LowRankOptimizer,
    OnlineSubspaceAdafactor,
    OnlineSubspaceAdamW,
    OnlineSubspaceAdamW8bit,
    OnlineSubspaceLion,
    build,
)
from lowrank.optimizers.engine.geometry import Geometry, RowRange
from lowrank.optimizers.projectors import OnlineProjector, ProjectedParam

SHAPES = ((14, 9), (9, 14), (11, 11))
# As in `test_golden`: six steps of the released code.
ROWS = (
    ((12, 8), "continuous", 200, (1.155203e-03, 7.406680e-02, 2.411246e-03, 6.264679e-03)),
    ((12, 8), "continuous", 5, (3.683550e-02, 6.947385e-02, 5.348697e-04, 1.690380e-03)),
    ((12, 8), "continuous_sgd", 200, (-9.197294e-04, 7.433828e-02, 2.426803e-03, 6.358437e-03)),
    ((8, 12), "continuous", 200, (-1.164408e-01, 6.802389e-02, -4.306436e-04, -3.058411e-03)),
    ((8, 12), "continuous_sgd", 5, (-1.152872e-01, 6.806735e-02, -3.977567e-04, -3.164828e-03)),
)


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2)) for k in range(steps)]


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


@pytest.mark.parametrize(("shape", "proj_type", "gap", "expected"), ROWS)
def test_golden_rows(
    shape: tuple[int, int], proj_type: str, gap: int, expected: tuple[float, ...]
) -> None:
    group = {"update_proj_gap": gap, "proj_type": proj_type, "scale": 0.25, "names": [None]}
    # the sum and single entries cancel: their error is that of a hundred fp32 entries
    result = golden_run(OnlineSubspaceAdamW, shape, group)
    assert result == pytest.approx(expected, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_closed_form_gradient_is_autograds(
    shape: tuple[int, int], side: str, penalty: float
) -> None:
    geometry = Geometry.of(shape, 4, side)
    grad = matrix(*shape, 1)
    size = shape[0] if side == "left" else shape[1]
    basis = torch.linalg.qr(matrix(size, 4, 2)).Q + 0.1 * matrix(size, 4, 3)
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    param = ProjectedParam(
        weight,
        grad,
        {"basis": basis},
        geometry,
        RowRange.whole(shape[0]),
        index=0,
        steps_done=1,
        seed_name="w",
    )
    projector = OnlineProjector(orthogonality=penalty)
    result = projector.gradient(param, projector.project(param))
    expected = references_beyond.pca_gradient(basis, grad, side == "left", penalty)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)
    # scale-free, also where squares over- and underflow
    for factor in (1e-100, 1e100):
        scaled = replace(param, grad=grad * factor, read=None)
        again = projector.gradient(scaled, projector.project(scaled))
        torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["std", "left", "right"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_equals_the_written_out_rule(
    shape: tuple[int, int], side: str, optimizer: str, penalty: float
) -> None:
    """Under a learning rate that warms up from zero and decays, which P's follows."""
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape)
    factors = [min(k / 4, (16 - k) / 12) for k in range(len(grads))]
    group = {
        "params": [weight],
        "rank": 4,
        "update_proj_gap": 20,
        "scale": 0.5,
        "projector": "online",
        "proj_type": side,
        "online_optimizer": optimizer,
        "orthogonality": penalty,
    }
    expected, basis = references_beyond.online_subspace(
        grads,
        weight.detach(),
        rank=4,
        lr=0.02,
        online_lr=1 / 20,
        online_optimizer=optimizer,
        factors=factors,
        scale=0.5,
        proj_type=side,
        penalty=penalty,
        weight_decay=0.1,
    )
    made = OnlineSubspaceAdamW([group], lr=0.02, weight_decay=0.1, refresh="svd")
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda k: factors[min(k, 11)])
    for grad in grads:
        weight.grad = grad.clone()
        made.step()
        schedule.step()
    torch.testing.assert_close(made.state[weight]["basis"], basis, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lion_takes_its_sign_after_the_back_projection(shape: tuple[int, int]) -> None:
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape)
    expected, _ = references_beyond.online_subspace(
        grads,
        weight.detach(),
        rank=4,
        lr=0.02,
        online_lr=1 / 20,
        online_optimizer="adamw",
        factors=[1.0] * len(grads),
        weight_decay=0.1,
        rule="lion",
    )
    group = {"params": [weight], "rank": 4, "update_proj_gap": 20}
    made = OnlineSubspaceLion([group], lr=0.02, weight_decay=0.1, refresh="svd")
    torch.testing.assert_close(train(made, weight, grads), expected, rtol=1e-9, atol=1e-10)


def test_lion_with_the_sign_in_the_subspace_stays_in_it() -> None:
    weight, grads = nn.Parameter(torch.zeros(9, 14, dtype=torch.float64)), gradients((9, 14), 1)
    made = OnlineSubspaceLion([{"params": [weight], "rank": 4}], lr=0.1, sign="subspace")
    train(made, weight, grads)
    basis = made.state[weight]["basis"]
    signs = basis.T @ weight.detach()
    torch.testing.assert_close(signs.abs(), torch.full((4, 14), 0.1 * 0.25, dtype=torch.float64))
    torch.testing.assert_close(basis @ signs, weight.detach())


@pytest.mark.parametrize("sign", ["weight", "subspace"])
def test_lion_of_plain_groups_and_of_a_coordinate_basis_are_lion(sign: str) -> None:
    grads = gradients((9, 14))
    plain, projected = (nn.Parameter(0.2 * matrix(9, 14, 0)) for _ in range(2))
    group = {"params": [projected], "rank": 99, "projector": "coordinate", "scale": 1.0}
    for made, weight in (
        (OnlineSubspaceLion([{**group, "schedule": "every"}], 0.02, sign=sign), projected),
        (
            OnlineSubspaceLion(
                [{"params": [plain]}, {"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2}],
                lr=0.02,
            ),
            plain,
        ),
    ):
        for made_group in made.param_groups:
            made_group["weight_decay"] = 0.1
        train(made, weight, grads)
    expected = references_beyond.lion(
        grads, 0.2 * matrix(9, 14, 0), lr=0.02, weight_decay=0.1, decay_first=False
    )
    torch.testing.assert_close(plain.detach(), expected)
    torch.testing.assert_close(projected.detach(), expected)


def energy(basis: Tensor, grad: Tensor) -> float:
    basis = torch.linalg.qr(basis).Q
    return float((basis.T @ grad).norm() ** 2 / grad.norm() ** 2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adam8bit"])
def test_the_basis_learns_a_new_subspace(optimizer: str) -> None:
    """From the singular vectors of one gradient to most of another's energy."""
    torch.manual_seed(1)
    first, second = (torch.randn(64, 4) @ torch.randn(4, 80) for _ in range(2))
    weight = nn.Parameter(torch.zeros(64, 80))
    rate = {"adamw": 0.02, "sgd": 1.0, "lion": 0.01, "adam8bit": 0.02}[optimizer]
    group = {"params": [weight], "rank": 4, "online_optimizer": optimizer, "online_lr": rate}
    made = OnlineSubspaceAdamW([group], lr=1e-3)
    train(made, weight, [first])
    before = energy(made.state[weight]["basis"], second)
    train(made, weight, [second] * 100)
    assert before < 0.3
    assert energy(made.state[weight]["basis"], second) > 0.9


def test_penalty_keeps_the_basis_orthonormal() -> None:
    defects = []
    for penalty in (0.0, 10.0):
        weight = nn.Parameter(0.2 * matrix(9, 14, 0).float())
        group = {"params": [weight], "rank": 4, "orthogonality": penalty, "online_lr": 0.01}
        made = OnlineSubspaceAdamW([group], lr=1e-3)
        train(made, weight, gradients((9, 14), 60))
        basis = made.state[weight]["basis"]
        defects.append(float((basis.T @ basis - torch.eye(4)).norm()))
    assert defects[1] < 0.3 * defects[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adam8bit"])
@pytest.mark.parametrize("storage", [None, "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_of_the_basiss_optimizer_is_saved(
    optimizer: str, storage: str | None, dtype: torch.dtype
) -> None:
    shape = (72, 80)  # above 4096 entries, so that 8 bits are 8 bits
    grads = gradients(shape, 8)

    def make(weight: nn.Parameter) -> LowRankOptimizer:
        group = {"params": [weight], "rank": 64, "online_optimizer": optimizer, "basis": storage}
        return OnlineSubspaceAdamW([group], lr=0.01)

    straight = nn.Parameter((0.2 * matrix(*shape, 0)).to(dtype))
    train(make(straight), straight, grads)
    weight = nn.Parameter((0.2 * matrix(*shape, 0)).to(dtype))
    made = make(weight)
    train(made, weight, grads[:4])
    keys = {key for key in made.state[weight] if key.startswith("basis_")}
    assert bool(keys) == (optimizer != "sgd")
    assert ("basis_exp_avg_absmax" in keys) == (optimizer == "adam8bit")
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(weight.detach().clone())
    made = make(resumed)
    made.load_state_dict(torch.load(file, weights_only=True))
    train(made, resumed, grads[4:])
    assert torch.equal(straight, resumed)
    expected = made.compose(made.param_groups[0]).state_bytes(shape, dtype.itemsize)
    measured = sum(
        value.numel() * value.element_size()
        for value in made.state[resumed].values()
        if isinstance(value, Tensor)
    )
    assert measured == expected


def test_no_gradient_no_basis_and_no_move() -> None:
    weight = nn.Parameter(torch.ones(6, 8))
    made = OnlineSubspaceAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 5}], lr=0.1)
    zero = torch.zeros(6, 8)
    train(made, weight, [zero])
    assert made.state[weight]["refreshed_at"] == -1
    train(made, weight, [matrix(6, 8, 1)])
    assert made.state[weight]["refreshed_at"] == 1
    basis = made.state[weight]["basis"].clone()
    made.param_groups[0]["lr"] = 0.0
    train(made, weight, [matrix(6, 8, 2)])  # lr_P is zero with lr
    assert torch.equal(made.state[weight]["basis"], basis)
    made.param_groups[0]["lr"] = 0.1
    train(made, weight, [zero])
    assert made.state[weight]["basis"].isfinite().all()


def test_official_values_of_proj_type() -> None:
    def group_of(**keys: Any) -> dict[str, Any]:
        weight = nn.Parameter(torch.zeros(4, 6))
        return OnlineSubspaceAdamW([{"params": [weight], "rank": 2, **keys}]).param_groups[0]

    assert group_of()["projector"] == "online"
    assert group_of()["schedule"] == "once"
    assert group_of(proj_type="continuous_lion")["online_optimizer"] == "lion"
    assert group_of(proj_type="continuous_adam8bit")["online_optimizer"] == "adam8bit"
    random = group_of(proj_type="random")
    assert (random["projector"], random["distribution"]) == ("random", "orthonormal")
    assert random["schedule"] == "every"
    for proj_type in ("std", "left", "right", "full"):
        plain = group_of(proj_type=proj_type)
        assert (plain["projector"], plain["schedule"]) == ("singular", "every")
    assert group_of(proj_type="left", projector="online")["projector"] == "online"
    with pytest.raises(ValueError, match="proj_type='continuous' with online_optimizer='sgd'"):
        group_of(proj_type="continuous", online_optimizer="sgd")
    with pytest.raises(ValueError, match="proj_type='full' with projector='online'"):
        group_of(proj_type="full", projector="online")
    with pytest.raises(ValueError, match="online_optimizer='adma'"):
        group_of(online_optimizer="adma")
    with pytest.raises(ValueError, match=r"online_lr=-1\.0"):
        group_of(online_lr=-1.0)
    with pytest.raises(ValueError, match="moments='reset' with projector='online'"):
        group_of(moments="reset")
    with pytest.raises(ValueError, match=r"online_lr=0\.1: accepted with projector='online'"):
        group_of(proj_type="std", online_lr=0.1)


def test_plain_proj_types_are_galore() -> None:
    ours, theirs = (nn.Parameter(0.2 * matrix(9, 14, 0)) for _ in range(2))
    keys = {"rank": 4, "update_proj_gap": 4, "proj_type": "std"}
    first = OnlineSubspaceAdamW([{"params": [ours], **keys}], lr=0.02)
    second = GaLoreAdamW([{"params": [theirs], **keys}], lr=0.02)
    grads = gradients((9, 14))
    assert torch.equal(train(first, ours, grads), train(second, theirs, grads))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (OnlineSubspaceAdafactor, {"beta1": 0.9}),
        (OnlineSubspaceAdamW8bit, {"min_8bit_size": 0}),
    ],
)
def test_the_other_rules_track_the_same_basis(
    cls: type[LowRankOptimizer], options: dict[str, Any]
) -> None:
    """What P does depends on the gradients alone."""
    grads, found = gradients((9, 14)), []
    for kind, extra in ((OnlineSubspaceAdamW, {}), (cls, options)):
        weight = nn.Parameter(0.2 * matrix(9, 14, 0).float())
        group = {"params": [weight], "rank": 4, "update_proj_gap": 20}
        made = kind([copy.copy(group)], lr=0.02, **extra)
        train(made, weight, grads)
        found.append(made.state[weight]["basis"])
    assert torch.equal(*found)


def test_tracking_makes_no_whole_temporary() -> None:
    weight = nn.Parameter(torch.zeros(512, 1024))
    made = OnlineSubspaceAdamW([{"params": [weight], "rank": 8}], lr=0.01, skip_nonfinite=False)
    weight.grad = torch.randn(512, 1024)
    made.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        made.step()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 512 * 1024 * 4 / 4


def test_a_scale_under_the_sign_of_weights_is_told(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_model()
    build("online_subspace_lion", model, lr=1e-3, rank=4)
    build("online_subspace_lion", model, lr=1e-3, rank=4, scale=0.5, sign="subspace")
    assert not recwarn
    with pytest.warns(UserWarning, match=r"scale=0\.5 has no effect with sign='weight'"):
        build("online_subspace_lion", model, lr=1e-3, rank=4, scale=0.5)
