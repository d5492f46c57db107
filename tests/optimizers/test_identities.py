"""Identities that tie the projected rules to their full-rank ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, LowRankOptimizer
from lowrank.optimizers.engine.composition import Composition
from lowrank.optimizers.engine.keywords import Keyword
from lowrank.optimizers.engine.options import Group
from lowrank.optimizers.engine.strategies import projection_of
from lowrank.optimizers.projectors import Bases, ProjectedParam, Projector
from lowrank.optimizers.rules import Update, UpdateRule


@dataclass(frozen=True)
class Coordinates(Projector):
    """P = I: the subspace of the first r coordinates."""

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        fitted: list[Bases | None] = []
        for param in params:
            bases = tuple(torch.eye(*shape) for shape in param.geometry.basis_shapes.values())
            self.store(param, bases)
            fitted.append(bases)
        return fitted


def with_coordinates(base: type[LowRankOptimizer]) -> type[LowRankOptimizer]:
    class OnCoordinates(base):  # type: ignore[misc, valid-type]
        def compose(self, group: Group) -> Composition:
            made = super().compose(group)
            if made.projection is None:
                return made
            return Composition(made.rule, replace(made.projection, projector=Coordinates()))

    return OnCoordinates


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int = 8) -> Tensor:
    for k in range(steps):
        m, n = weight.shape
        weight.grad = (1e-2 * (matrix(m, n, 1) + 0.6 * matrix(m, n, k + 2))).to(weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (GaLoreAdamW, {"weight_decay": 0.1}),
        (GaLoreAdafactor, {"beta1": 0.9, "weight_decay": 0.1}),
        (GaLoreAdamW8bit, {"min_8bit_size": 0, "weight_decay": 0.0}),
    ],
)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=str)
def test_coordinate_basis_at_full_rank_equals_the_full_rule(
    base: type[LowRankOptimizer], options: dict[str, Any], shape: tuple[int, int]
) -> None:
    projected = nn.Parameter(matrix(*shape, 0))
    plain = nn.Parameter(matrix(*shape, 0))
    other = nn.Parameter(torch.zeros(4, 4))
    group = {"params": [projected], "rank": 99, "scale": 1.0, "update_proj_gap": 3}
    first = run(with_coordinates(base)([group], lr=0.02, **options), projected)
    optimizer = base([{"params": [plain]}, {"params": [other], "rank": 2}], lr=0.02, **options)
    torch.testing.assert_close(first, run(optimizer, plain), rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Momentum(UpdateRule):
    """SGD with momentum 0.9, for the identity below."""

    lr: float

    def init(self, shape: Sequence[int], like: Tensor) -> dict[str, Any]:
        return {"momentum_buffer": like.new_zeros(tuple(shape))}

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return torch.Size(shape).numel() * itemsize

    def update(
        self,
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        weights: Sequence[Tensor],
    ) -> list[Update]:
        return [
            Update(state["momentum_buffer"].mul_(0.9).add_(grad).clone(), self.lr, 1.0)
            for grad, state in zip(grads, states, strict=True)
        ]


class GaLoreMomentum(LowRankOptimizer):
    """GaLore's projector with a rule of its own: what it needs is one `compose`."""

    own_keywords = (Keyword("lr", 0.02, ""), Keyword("weight_decay", 0.0, ""))

    def compose(self, group: Group) -> Composition:
        return Composition(Momentum(group["lr"]), projection_of(group))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=str)
def test_full_rank_galore_with_momentum_sgd_equals_sgd(shape: tuple[int, int]) -> None:
    """Linear rules commute with a rotation; one basis, since moments are kept at a refresh."""
    projected, plain = nn.Parameter(matrix(*shape, 0)), nn.Parameter(matrix(*shape, 0))
    group = {"params": [projected], "rank": 99, "scale": 1.0, "update_proj_gap": 1000}
    first = run(GaLoreMomentum([group], lr=0.02), projected)
    second = run(torch.optim.SGD([plain], lr=0.02, momentum=0.9), plain)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_full_rank_galore_with_adam_is_not_adamw() -> None:
    """Adam in a rotated basis: elementwise, so the basis matters."""
    projected, plain = nn.Parameter(matrix(9, 6, 0)), nn.Parameter(matrix(9, 6, 0))
    group = {"params": [projected], "rank": 6, "scale": 1.0, "update_proj_gap": 1000}
    first = run(GaLoreAdamW([group], lr=0.02), projected)
    optimizer = GaLoreAdamW(
        [{"params": [plain]}, {"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2}], lr=0.02
    )
    assert (first - run(optimizer, plain)).norm() > 1e-3


def test_projection_commutes_with_sums() -> None:
    """Accumulated micro-batches project to the sum of their projections."""
    basis = torch.linalg.qr(matrix(9, 3, 5)).Q
    grads = [matrix(9, 6, k) for k in range(4)]
    together = basis.T @ torch.stack(grads).sum(0)
    torch.testing.assert_close(together, torch.stack([basis.T @ g for g in grads]).sum(0))
