"""One matrix under an optimizer whose options are changed."""

from __future__ import annotations

from typing import Any

from support import matrix
from table import TABLE
from torch import Tensor, nn

from lowrank.optimizers import GaLoreAdamW, LowRankOptimizer

BETAS = (0.9, 0.999)
SHAPES = ((14, 9), (9, 14))


def gradient(shape: tuple[int, int], step: int) -> Tensor:
    return 1e-2 * (0.4 * matrix(*shape, 1) + matrix(*shape, step + 2))


def run(made: LowRankOptimizer, weight: nn.Parameter, steps: range) -> None:
    for step in steps:
        weight.grad = gradient(tuple(weight.shape), step).to(weight.dtype)
        made.step()


def galore(
    shape: tuple[int, int], optimizer: Any = GaLoreAdamW, keywords: Any = None, **options: Any
) -> tuple[nn.Parameter, LowRankOptimizer]:
    weight = nn.Parameter(0.2 * matrix(*shape, 0))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 100, "scale": 0.5, **options}
    return weight, optimizer([group], lr=0.02, **{"refresh": "svd", **(keywords or {})})


def row_named(name: str) -> Any:
    return next(row for row in TABLE if row.name == name)
