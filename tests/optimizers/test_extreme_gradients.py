"""Gradients that are zero, tiny or huge, in part or whole: weights stay finite, in fp16 as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import (
    AliceAdamW,
    ApolloAdamW,
    ApolloMiniAdamW,
    FiraAdamW,
    FloraAdafactor,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreMuon,
    LDAdamW,
    OnlineSubspaceLion,
)
from lowrank.optimizers.residuals.limiter import limit_growth

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "dropped": (GaLoreAdamW, {}),
    "norm_scaled": (FiraAdamW, {}),
    "norm_scaled, beta 1": (FiraAdamW, {"residual_scale": 1.0}),
    "norm_scaled, no limiter": (FiraAdamW, {"limiter": None}),
    "norm_scaled, 8 bits": (GaLoreAdamW8bit, {"residual": "norm_scaled", "min_8bit_size": 0}),
    "norm_scaled, Adafactor": (GaLoreAdafactor, {"residual": "norm_scaled"}),
    "scaled": (ApolloAdamW, {}),
    "scaled, front": (ApolloAdamW, {"scale_front": True}),
    "scaled, tensor": (ApolloMiniAdamW, {"rank": 1}),
    "scaled, Muon": (GaLoreMuon, {"residual": "scaled"}),
    "sign": (FrugalAdamW, {}),
    "sgd": (FrugalAdamW, {"inactive_update": "sgd"}),
    "row_normalised": (GaLoreAdamW, {"residual": "row_normalised"}),
    "column-wise": (AliceAdamW, {}),
    "error feedback": (LDAdamW, {}),
    "signed back": (OnlineSubspaceLion, {}),
    "Flora": (FloraAdafactor, {"beta1": 0.9}),
}


def noise(stream: int, size: float) -> Tensor:
    return (size * matrix(24, 40, stream)).float()


def cases(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    zero, columns, rows = torch.zeros(24, 40), noise(3, 1e-2), noise(4, 1e-2)
    columns[:, ::2], rows[::2] = 0.0, 0.0
    usual, other = noise(1, 1e-2), noise(2, 1e-2)
    # Squares of the latter, and sums of them, are below fp32's largest number.
    huge = 2e3 if dtype == torch.float16 else 1e15
    return {
        "zero first": [zero, zero, usual, other],
        "zero after": [usual, other, zero, zero, usual],
        "tiny": [noise(k, 1e-7) for k in range(4)],
        "tinier": [noise(k, 1e-13) for k in range(4)],
        "tiny after": [usual, other, noise(5, 1e-7), usual],
        "small after": [usual, other, noise(5, 1e-5), usual],
        "huge": [noise(k, huge) for k in range(4)],
        "huge after tiny": [noise(1, 1e-7), noise(2, 1e-7), noise(3, huge), noise(4, 1e-7)],
        "columns": [usual, columns, columns, usual],
        "rows": [usual, rows, rows, usual],
        "columns first": [columns, columns, usual],
        "rows first": [rows, rows, usual],
    }


def train(
    kind: str, grads: list[Tensor], side: str, dtype: torch.dtype, start: float = 0.1
) -> Tensor:
    weight = nn.Parameter(torch.full((24, 40), start, dtype=dtype))
    method, options = KINDS[kind]
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "proj_type": side, **options}
    made = method([group], lr=1e-3)
    for grad in grads:
        weight.grad = grad.to(dtype)
        made.step()
    return weight.detach().float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_finite_and_move_little(
    kind: str, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    named = cases(dtype)
    if dtype != torch.float16:  # whose range these have
        named = {name: named[name] for name in ("zero after", "tinier", "huge after tiny")}
    for index, (name, grads) in enumerate(named.items()):
        # Both sides where they differ; the others take turns.
        both = "columns" in name or "rows" in name
        for side in ("left", "right") if both else (("left", "right")[index % 2],):
            change = train(kind, grads, side, dtype) - 0.1
            assert bool(change.isfinite().all()), (name, side)
            # Four or five steps with lr 1e-3; a factor for Fira's residual, unlimited at first.
            if kind != "sgd" and "8 bits" not in kind:
                assert float(change.abs().max()) < 0.2, (name, side, float(change.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "scaled" in kind])
@pytest.mark.parametrize("name", ["zero after", "small after", "columns", "rows"])
def test_fp16_does_what_fp32_does(kind: str, name: str) -> None:
    """Not only finite: large factors of small gradients are not lost either."""
    grads = [grad.half().float() for grad in cases(torch.float16)[name]]
    for side in ("left", "right"):
        half = train(kind, grads, side, torch.float16, start=0.0)
        full = train(kind, grads, side, torch.float32, start=0.0)
        # codes of 8-bit moments flip with the last bits of fp16
        slack = 0.3 if "8 bits" in kind else 0.05
        assert float((half - full).norm()) < slack * float(full.norm()), side


#: Adafactor's own factors overflow there.
OVERFLOWING = [k for k in KINDS if "scaled" in k and "8" not in k and "Ada" not in k]


@pytest.mark.parametrize("kind", OVERFLOWING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norms_whose_squares_overflow(kind: str, dtype: torch.dtype) -> None:
    """Beyond 1.8e19 the second moment is infinite and the step zero, not NaN."""
    grads = [noise(1, 1e-7), noise(2, 1e-2), noise(3, 1e30), noise(4, 1e-2), noise(5, 1e30)]
    for side in ("left", "right"):
        assert bool(train(kind, grads, side, dtype).isfinite().all())


def test_the_limiter_outlives_norms_that_are_not_finite_or_zero() -> None:
    stored = torch.tensor(1.0)
    assert float(limit_growth(stored, torch.tensor(float("inf")), 1.01)) == 0.0
    assert float(stored) == pytest.approx(1.01)
    assert float(limit_growth(stored, torch.tensor(2.0), 1.01)) == pytest.approx(1.01**2 / 2)
    assert float(limit_growth(stored, torch.tensor(0.0), 1.01)) == 1.0
    assert float(stored) == 0.0
    assert float(limit_growth(stored, torch.tensor(5.0), 1.01)) == 1.0  # none was stored
    assert float(stored) == 5.0
