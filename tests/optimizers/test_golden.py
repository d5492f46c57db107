"""Numbers that the official packages gave (CPU, fp32)."""

from __future__ import annotations

from typing import Any

import pytest
from support import matrix
from torch import nn

from lowrank.optimizers import FiraAdamW, GaLoreAdafactor, GaLoreAdamW, LowRankOptimizer

# sum(W6 - W0), ||W6 - W0||, (W6 - W0)[0, 0], (W6 - W0)[-1, -1] after six steps; see `golden_run`.
ADAM_ROWS = (
    ((12, 8), "std", 1000, (-9.680510e-04, 7.434092e-02, 2.427340e-03, 6.365202e-03)),
    ((12, 8), "reverse_std", 1000, (2.589950e-03, 6.295904e-02, 3.789231e-03, 6.594218e-03)),
    ((12, 8), "full", 1000, (-9.633764e-03, 3.259334e-02, 1.191348e-04, 2.654031e-03)),
    ((8, 12), "std", 1000, (-1.166497e-01, 6.818301e-02, -7.019043e-04, -2.785437e-03)),
    ((8, 12), "reverse_std", 1000, (-7.404212e-02, 6.187803e-02, -2.534628e-03, -9.430423e-04)),
    ((8, 12), "full", 1000, (-1.205285e-02, 3.017363e-02, 1.521036e-04, 1.064532e-03)),
    ((12, 8), "std", 3, (-1.186023e-02, 5.491444e-02, 2.490297e-03, 2.290338e-03)),
    ((8, 12), "std", 3, (-6.102826e-02, 5.327122e-02, -3.380999e-04, -9.785295e-04)),
)
ADAFACTOR_ROWS = (
    ((12, 8), None, (7.486912e-03, 7.918332e-02, 1.820125e-03, 7.081896e-03)),
    ((12, 8), 0.9, (5.418096e-03, 2.409379e-02, 3.600344e-04, 2.414562e-03)),
    ((8, 12), None, (-1.234916e-01, 7.727175e-02, -1.457006e-03, 1.270019e-03)),
    ((8, 12), 0.9, (-3.507009e-02, 2.319664e-02, -6.725937e-04, -4.202127e-06)),
)
FIRA_ROWS = (
    ((12, 8), 1.0, 1000, (-3.154563e-01, 3.281723e-01, -1.006013e-02, 3.081147e-02)),
    ((12, 8), 0.25, 1000, (-3.450307e-01, 2.639917e-01, -1.842407e-02, 2.247325e-02)),
    ((8, 12), 1.0, 1000, (-5.518361e-01, 4.562267e-01, -2.205233e-02, -3.955632e-03)),
    ((8, 12), 0.25, 1000, (-5.254804e-01, 4.441329e-01, -2.091390e-02, 1.074191e-02)),
    ((12, 8), 0.25, 3, (-3.339737e-01, 2.520570e-01, -1.404243e-02, 2.227336e-02)),
)


def golden_run(
    optimizer: type[LowRankOptimizer],
    shape: tuple[int, int],
    group: dict[str, Any],
    *,
    size: float = 1e-2,
    **options: Any,
) -> tuple[float, ...]:
    weight = nn.Parameter((0.2 * matrix(*shape, 0)).float())
    start = weight.detach().clone()
    made = optimizer(
        [{"params": [weight], "rank": 3, **group}],
        lr=0.01,
        weight_decay=0.1,
        refresh="svd",
        **options,
    )
    for step in range(6):
        weight.grad = (size * (matrix(*shape, 1) + 0.6 * matrix(*shape, step + 2))).float()
        made.step()
    change = weight.detach() - start
    return (
        change.sum().item(),
        change.norm().item(),
        change[0, 0].item(),
        change[-1, -1].item(),
    )


def test_inputs_are_the_golden_ones() -> None:
    start = (0.2 * matrix(12, 8, 0)).float()
    assert start.sum().item() == pytest.approx(-0.7046551276580431, abs=1e-6)
    assert start.norm().item() == pytest.approx(0.5576284423536144, rel=1e-6)


@pytest.mark.parametrize(("shape", "proj_type", "gap", "expected"), ADAM_ROWS)
def test_galore_adamw_golden_rows(
    shape: tuple[int, int], proj_type: str, gap: int, expected: tuple[float, ...]
) -> None:
    group = {"update_proj_gap": gap, "proj_type": proj_type, "scale": 0.25}
    # the sum cancels: its error is that of a hundred fp32 entries
    assert golden_run(GaLoreAdamW, shape, group) == pytest.approx(expected, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize(("shape", "beta1", "expected"), ADAFACTOR_ROWS)
def test_galore_adafactor_golden_rows(
    shape: tuple[int, int], beta1: float | None, expected: tuple[float, ...]
) -> None:
    result = golden_run(
        GaLoreAdafactor,
        shape,
        {"update_proj_gap": 1000, "scale": 0.25},
        beta1=beta1,
        scale_parameter=False,
    )
    assert result == pytest.approx(expected, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize(("shape", "alpha", "gap", "expected"), FIRA_ROWS)
def test_fira_golden_rows(
    shape: tuple[int, int], alpha: float, gap: int, expected: tuple[float, ...]
) -> None:
    result = golden_run(FiraAdamW, shape, {"update_proj_gap": gap, "alpha": alpha})
    assert result == pytest.approx(expected, rel=1e-5, abs=3e-7)
