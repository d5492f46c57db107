"""FRUGAL, the coordinate projector and the sign residual."""

from __future__ import annotations

from typing import Any

import pytest
import references
import references_beyond
import torch
from support import matrix, tiny_model
from torch import Tensor, nn

from lowrank.optimizers import (
    AdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreMuon,
    LowRankOptimizer,
    build,
)
from lowrank.optimizers.engine.geometry import Geometry, RowRange
from lowrank.optimizers.projectors import CoordinateProjector, ProjectedParam
from lowrank.optimizers.projectors.coordinate import INDEX

SHAPES = ((14, 9), (9, 14), (11, 11))
SIDES = ("std", "reverse_std", "left", "right", "full")


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2)) for k in range(steps)]


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


def one_hot(state: dict[str, Any], key: str, size: int) -> Tensor | None:
    if key + INDEX not in state:
        return None
    index = state[key + INDEX].long()
    return torch.eye(size, dtype=torch.float64)[:, index]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("update", ["sign", "sgd"])
def test_coordinates_equal_the_written_out_rule(
    shape: tuple[int, int], side: str, update: str
) -> None:
    weight, grads, bases = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape), []
    start = weight.detach().clone()
    group = {
        "params": [weight],
        "rank": 4,
        "update_proj_gap": 5,
        "proj_type": side,
        "inactive_lr_scale": 0.5,
        "inactive_update": update,
    }
    made = FrugalAdamW([group], lr=0.02, weight_decay=0.1)
    for grad in grads:
        train(made, weight, [grad])
        state = made.state[weight]
        if side == "full":
            pair = (one_hot(state, "basis", shape[0]), one_hot(state, "basis_right", shape[1]))
        else:
            left = state["side"] == 0
            only = one_hot(state, "basis", shape[0] if left else shape[1])
            pair = references_beyond.one_sided(only, left)
        bases.append(pair)
    expected = references_beyond.frugal(
        grads,
        start,
        bases.__getitem__,
        gap=5,
        lr=0.02,
        inactive=0.5,
        update=update,
        weight_decay=0.1,
    )
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_singular_vectors_equal_the_written_out_rule(shape: tuple[int, int], scale: float) -> None:
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape)
    bases = [references.galore_bases(grads[k - k % 5], 4, "std") for k in range(len(grads))]
    expected = references_beyond.frugal(
        grads, weight.detach(), bases.__getitem__, gap=5, lr=0.02, scale=scale
    )
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "projector": "singular"}
    made = FrugalAdamW([{**group, "scale": scale}], lr=0.02, refresh="svd")
    torch.testing.assert_close(train(made, weight, grads), expected, rtol=1e-9, atol=1e-10)


def test_random_directions_are_orthonormal_and_redrawn() -> None:
    weight, grads = nn.Parameter(0.2 * matrix(9, 14, 0)), gradients((9, 14))
    group = {"params": [weight], "rank": 4, "projector": "random", "distribution": "orthonormal"}
    made = FrugalAdamW([{**group, "update_proj_gap": 2}], lr=0.02)
    seen = []
    for grad in grads[:4]:
        train(made, weight, [grad])
        basis = made.state[weight]["basis"].clone()
        torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
        seen.append(basis)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("projector", ["coordinate", "singular"])
def test_nothing_is_outside_at_full_rank(projector: str) -> None:
    """No sign of a rounding error: at full rank FRUGAL has no signSGD part."""
    grads = gradients((9, 14))
    results = []
    for residual in ("sign", "dropped"):
        weight = nn.Parameter(0.2 * matrix(9, 14, 0).float())
        group = {"params": [weight], "rank": 99, "projector": projector, "residual": residual}
        results.append(train(FrugalAdamW([group], lr=0.02), weight, grads))
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FrugalAdamW, {"moments": "keep", "weight_decay": 0.1}),
        (GaLoreAdamW, {"weight_decay": 0.1}),
        (GaLoreAdafactor, {"beta1": 0.9, "weight_decay": 0.1}),
        (FiraAdamW, {"residual_scale": 1.0, "weight_decay": 0.1}),
    ],
)
def test_all_coordinates_are_the_full_rank_rule(
    cls: type[LowRankOptimizer], options: dict[str, Any], shape: tuple[int, int], side: str
) -> None:
    if cls is FiraAdamW and side == "full":
        return
    rank, grads = min(shape), gradients(shape)
    if {"left": shape[0], "right": shape[1], "full": max(shape)}[side] != rank:
        return  # the rank is clamped to the short side, which leaves the long one incomplete
    projected, plain = (nn.Parameter(0.2 * matrix(*shape, 0)) for _ in range(2))
    keys = {"rank": rank, "scale": 1.0, "update_proj_gap": 3, "proj_type": side}
    first = cls([{"params": [projected], **keys, "projector": "coordinate"}], lr=0.02, **options)
    other = nn.Parameter(torch.zeros(4, 4))
    second = cls([{"params": [plain]}, {"params": [other], "rank": 2}], lr=0.02, **options)
    expected = train(second, plain, grads)
    torch.testing.assert_close(train(first, projected, grads), expected, rtol=1e-9, atol=1e-9)


def test_plain_groups_are_adamw() -> None:
    grads, first, second = gradients((9, 14)), *(nn.Parameter(matrix(9, 14, 0)) for _ in range(2))
    other = nn.Parameter(torch.zeros(4, 4))
    made = FrugalAdamW([{"params": [first]}, {"params": [other], "rank": 2}], lr=0.02)
    assert torch.equal(train(made, first, grads), train(AdamW([second], lr=0.02), second, grads))


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreMuon])
def test_sign_residual_moves_by_the_learning_rate_under_every_rule(
    cls: type[LowRankOptimizer],
) -> None:
    """Whatever factors a rule's own update has."""
    weight, grad = nn.Parameter(torch.ones(9, 14, dtype=torch.float64)), matrix(9, 14, 1)
    group = {"params": [weight], "rank": 4, "projector": "coordinate", "residual": "sign"}
    extra = {"scale_parameter": False} if cls is GaLoreAdafactor else {}
    made = cls([{**group, "scale": 1.0}], lr=0.02, **extra)
    train(made, weight, [grad])
    outside = torch.ones(9, dtype=torch.bool)
    outside[made.state[weight]["basis" + INDEX].long()] = False
    change = weight.detach() - 1.0
    torch.testing.assert_close(change[outside], -0.02 * grad[outside].sign())


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_coordinates_by_rows_equal_the_whole(side: str) -> None:
    """Row blocks gather, scatter and leave out what the whole matrix does."""
    geometry = Geometry.of((11, 7), 3, side)
    grad, weight = matrix(11, 7, 1), matrix(11, 7, 2)
    projector = CoordinateProjector()
    state = projector.init(geometry, weight) | {"refreshed_at": -1}
    param = ProjectedParam(
        nn.Parameter(weight), grad, state, geometry, RowRange.whole(11), 0, 0, "w"
    )
    projector.fit([param])
    low = projector.project(param)
    left, right = (
        one_hot(state, "basis", 11 if side != "right" else 7),
        one_hot(state, "basis_right", 7),
    )
    pair = (None, left) if side == "right" else (left, right)
    torch.testing.assert_close(low, references.down(grad, *pair))
    torch.testing.assert_close(
        projector.bases(param)[0], left if left is not None else right, check_dtype=False
    )
    back = references.up(low, *pair)
    result, outside = weight.clone(), []
    for start, stop in ((0, 1), (1, 4), (4, 11)):
        projector.write_back(
            param, result[start:stop], RowRange(start, stop), low, alpha=0.5, decay_factor=0.9
        )
        outside.append(projector.outside(param, low, slice(start, stop)))
    torch.testing.assert_close(result, 0.9 * weight - 0.5 * back)
    assert torch.equal(torch.cat(outside), grad - back)
    if side == "left":  # each process's rows add up to the projection
        parts = []
        for start, stop in ((0, 4), (4, 11)):
            rows = RowRange(start, stop)
            local = ProjectedParam(param.weight, grad[start:stop], state, geometry, rows, 0, 0, "w")
            parts.append(projector.project(local))
        torch.testing.assert_close(sum(parts), low)


def test_a_bad_entry_outside_the_coordinates_is_seen() -> None:
    weight = nn.Parameter(torch.ones(9, 14))
    made = FrugalAdamW([{"params": [weight], "rank": 1}], lr=0.02)
    train(made, weight, [matrix(9, 14, 1)])
    before = weight.detach().clone()
    for row in range(9):
        grad = matrix(9, 14, 2).float()
        grad[row, 3] = float("nan")
        weight.grad = grad
        if row == 0:
            with pytest.warns(UserWarning, match="non-finite"):
                made.step()
        else:
            made.step()
        assert torch.equal(weight, before)


def test_density_is_a_share_of_the_short_side() -> None:
    for short in (10, 16, 100, 768):
        for density in (0.1, 0.25, 0.3, 0.6, 1.0):
            weight = nn.Parameter(torch.zeros(short, 1000, device="meta"))
            made = FrugalAdamW([{"params": [weight], "density": density}])
            expected = max(1, int(short * density + 1e-9))
            assert made.state[weight]["exp_avg"].shape == (expected, 1000)
    weight = nn.Parameter(torch.zeros(8, 12))
    made = FrugalAdamW([{"params": [weight], "is_proj_params": True}], density=0.5)
    assert made.state[weight]["exp_avg"].shape == (4, 12)
    model = tiny_model()
    made = build("frugal_adamw", model, density=0.25)
    assert made.state[model.self_attn["q_proj"].weight]["exp_avg"].shape == (16, 4)
    for density in (0.0, 1.5, "half"):
        with pytest.raises(ValueError, match=f"density={density!r}"):
            FrugalAdamW([{"params": [weight], "density": density}])


def test_what_makes_no_sense_raises() -> None:
    weight = nn.Parameter(torch.zeros(8, 12))
    group = {"params": [weight], "rank": 2}
    with pytest.raises(ValueError, match="inactive_update='adam'"):
        FrugalAdamW([{**group, "inactive_update": "adam"}])
    with pytest.raises(ValueError, match=r"inactive_lr_scale=-1\.0"):
        FrugalAdamW([{**group, "inactive_lr_scale": -1.0}])
    with pytest.raises(ValueError, match="basis with projector='coordinate'"):
        FrugalAdamW([{**group, "basis": "float32"}])
    with pytest.raises(ValueError, match="moments='reset' with capturable=True"):
        FrugalAdamW([{**group}], capturable=True)
    FrugalAdamW([{**group}], capturable=True, moments="keep")


@pytest.mark.parametrize("projector", ["coordinate", "singular"])
def test_no_whole_temporary(projector: str) -> None:
    weight = nn.Parameter(torch.zeros(1024, 2048))
    made = FrugalAdamW([{"params": [weight], "rank": 8, "projector": projector}], lr=0.01)
    weight.grad = torch.randn(1024, 2048)
    made.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        made.step()
    assert max(event.cpu_memory_usage for event in profile.events()) < 1024 * 2048 * 4 / 4
