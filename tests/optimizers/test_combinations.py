"""Any projector with any rule, residual, storage, schedule and move: it trains or says why not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import matrix
from torch import nn

from lowrank import optimizers
from lowrank.optimizers import LowRankOptimizer, state_bytes
from lowrank.optimizers.engine.strategies import PROJECTORS, RESIDUALS, SCHEDULES, STORAGES
from lowrank.optimizers.rules import MOMENT_TRANSPORTS

RULES: tuple[tuple[type[LowRankOptimizer], dict[str, Any]], ...] = (
    (optimizers.GaLoreAdamW, {}),
    (optimizers.GaLoreAdamW8bit, {"min_8bit_size": 0}),
    (optimizers.GaLoreAdafactor, {"beta1": 0.9}),
    (optimizers.GaLoreMuon, {}),
    (optimizers.OnlineSubspaceLion, {}),
)
#: What a strategy can't do without.
NEEDED: dict[str, dict[str, Any]] = {"cross_head": {"heads": 2}}

Combination = tuple[Any, ...]


def everything() -> list[Combination]:
    return list(product(RULES, PROJECTORS, RESIDUALS, STORAGES, SCHEDULES, MOMENT_TRANSPORTS))


def covering_pairs() -> Iterator[Combination]:
    """Combinations such that any two strategies of two seams occur together."""
    seams = (RULES, PROJECTORS, RESIDUALS, STORAGES, SCHEDULES, MOMENT_TRANSPORTS)
    missing = {
        (i, a, j, b)
        for i, first in enumerate(seams)
        for j, second in enumerate(seams)
        if i < j
        for a in range(len(first))
        for b in range(len(second))
    }
    lists = [list(seam) for seam in seams]
    while missing:
        # the combination, of a hundred drawn by a fixed rule, that covers most of what is missing
        best: tuple[int, ...] = ()
        gain = 0
        for draw in range(100):
            seed = len(missing) * 100 + draw
            indices = tuple(
                (seed * 2654435761 // (i + 7) ** 3) % len(lists[i]) for i in range(len(lists))
            )
            covered = sum(
                (i, indices[i], j, indices[j]) in missing
                for i in range(len(indices))
                for j in range(i + 1, len(indices))
            )
            if covered > gain:
                best, gain = indices, covered
        if not best:  # no draw helps: build one around a missing pair
            i, a, j, b = min(missing)
            best = tuple(a if k == i else b if k == j else 0 for k in range(len(lists)))
        for i in range(len(best)):
            for j in range(i + 1, len(best)):
                missing.discard((i, best[i], j, best[j]))
        yield tuple(lists[k][index] for k, index in enumerate(best))


def name_of(combination: Combination) -> str:
    (rule, _), *others = combination
    return "-".join([rule.__name__, *map(str, others)])


def make(combination: Combination, weight: nn.Parameter) -> LowRankOptimizer:
    (rule, options), projector, residual, basis, schedule, moments = combination
    group = {
        "params": [weight],
        "rank": 4,
        "update_proj_gap": 2,
        "proj_type": "std",
        "projector": projector,
        "residual": residual,
        "basis": basis,
        "schedule": schedule,
        "moments": moments,
        **NEEDED.get(projector, {}),
    }
    return rule([group], lr=1e-2, **options)


def step(made: LowRankOptimizer, weight: nn.Parameter, number: int) -> None:
    m, n = weight.shape
    weight.grad = (1e-2 * (matrix(m, n, 1) + 0.6 * matrix(m, n, number + 2))).float()
    made.step()


def check(combination: Combination, shape: tuple[int, int]) -> bool:
    """Whether it was accepted; what is accepted trains, resumes exactly and counts its bytes."""
    start = (0.2 * matrix(*shape, 0)).float()
    weight = nn.Parameter(start.clone())
    try:
        made = make(combination, weight)
    except ValueError as error:
        if "accept" not in str(error):
            raise
        return False
    for number in range(3):
        step(made, weight, number)
    twin = nn.Parameter(weight.detach().clone())
    resumed = make(combination, twin)
    resumed.load_state_dict(copy.deepcopy(made.state_dict()))
    for number in range(3, 6):
        step(made, weight, number)
        step(resumed, twin, number)
    assert weight.isfinite().all()
    assert not torch.equal(weight, start)
    assert torch.equal(weight, twin)
    composition = made.compose(made.param_groups[0])
    assert state_bytes(made) == composition.state_bytes(shape, 4)
    return True


@pytest.mark.parametrize("combination", list(covering_pairs()), ids=name_of)
def test_pairs_of_strategies(combination: Combination) -> None:
    for shape in ((12, 8), (8, 12)):
        check(combination, shape)


@pytest.mark.slow
def test_many_combinations() -> None:
    """Every twenty-third, which has no factor in common with the numbers of strategies."""
    chosen = everything()[::23]
    assert all(len({c[seam] if seam else c[0][0] for c in chosen}) > 2 for seam in range(6))
    accepted = sum(check(combination, (12, 8)) for combination in chosen)
    assert accepted > len(chosen) // 2
