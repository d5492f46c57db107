"""State bytes of five methods on LLaMA's shapes, against formulas written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_model
from table import each_size
from test_groups_and_registry import LLAMA, Llama

from lowrank.optimizers import build, expected_state_bytes, state_bytes

B = 2  # bytes of a bf16 number
S = 4  # of a moment under bf16 weights
STEP = 4
SMALL = 4  # the limiter's norm


def adam(count: int) -> int:
    return 2 * S * count + STEP


def online(m: int, n: int, r: int) -> int:
    return (B + 2 * S) * m * r + 2 * S * n * r + STEP


def online_sgd(m: int, n: int, r: int) -> int:
    return B * m * r + 2 * S * n * r + STEP


def apollo(m: int, n: int, r: int) -> int:
    return 2 * S * n * r + STEP + SMALL


def apollo_svd(m: int, n: int, r: int) -> int:
    return apollo(m, n, r) + B * m * r


def mini(m: int, n: int, r: int) -> int:
    return apollo(m, n, 1)


def frugal(m: int, n: int, r: int) -> int:
    return 2 * S * n * (m // 4) + 4 * (m // 4) + STEP


def flora(m: int, n: int, r: int) -> int:
    return 4 * (n * r + m + n) + STEP


CASES: tuple[tuple[str, dict[str, Any], Callable[[int, int, int], int]], ...] = (
    ("online_subspace_adamw", {}, online),
    ("online_subspace_adamw", {"proj_type": "continuous"}, online),
    ("online_subspace_adamw", {"proj_type": "continuous_sgd"}, online_sgd),
    ("apollo_adamw", {}, apollo),
    ("apollo_adamw", {"proj": "svd"}, apollo_svd),
    ("apollo_mini_adamw", {"rank": 1}, mini),
    ("frugal_adamw", {"density": 0.25}, frugal),
    ("flora_adafactor", {}, flora),
)


@each_size(LLAMA)
@pytest.mark.parametrize(("name", "options", "formula"), CASES)
def test_bytes_of_llama_are_the_formula(
    name: str, options: dict[str, Any], formula: Callable[[int, int, int], int], size: str
) -> None:
    hidden, ffn, layers, rank = LLAMA[size]
    with torch.device("meta"):
        model = Llama(hidden, ffn, layers).bfloat16()
    matrices = [(hidden, hidden)] * 4 * layers + [(hidden, ffn)] * 3 * layers
    tables, norms = [(32000, hidden)] * 2, [hidden] * (2 * layers + 1)
    expected = sum(formula(m, n, rank) for m, n in matrices)
    if name == "flora_adafactor":  # plain Adafactor with its first moment
        expected += sum(4 * (m * n + m + n) + STEP for m, n in tables)
        expected += sum(4 * 2 * n + STEP for n in norms)
    else:
        expected += sum(adam(m * n) for m, n in tables) + sum(map(adam, norms))
    options = {"rank": rank, **options}
    assert expected_state_bytes(name, model, **options) == expected
    assert state_bytes(build(name, model, **options)) == expected


@pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES])
def test_bytes_do_not_change_with_training(name: str, options: dict[str, Any]) -> None:
    model = tiny_model()
    options = {"rank": 4, "update_proj_gap": 2, **options}
    made = build(name, model, lr=1e-3, **options)
    before = state_bytes(made)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        made.step()
    assert state_bytes(made) == before == expected_state_bytes(name, model, **options)
