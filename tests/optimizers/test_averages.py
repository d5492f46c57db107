"""Running averages of weights in 8 and 4 bits, by `torch.optim.swa_utils`."""

from __future__ import annotations

import pytest
import torch
from support import matrix
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lowrank.optimizers import Int4Weight, Int8Weight, QuantizedWeight

KINDS = [Int8Weight, Int4Weight]
STEPS = 60


def layer(kind: type[QuantizedWeight], dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(64, 32, dtype=dtype)
    made.weight = nn.Parameter(kind.quantize((0.1 * matrix(32, 64, 0)).to(dtype), 64))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_follows_weights_that_move_less_than_a_code(
    kind: type[QuantizedWeight], dtype: torch.dtype
) -> None:
    """A fifth of a step of 8 bits each time: rounding to the nearest would never move."""
    model = layer(kind, dtype)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    start = model.weight.detach().clone().double()
    target = (start + 0.01 * torch.sign(start)).to(dtype)
    average.update_parameters(model)  # copies
    with torch.no_grad():
        model.weight = nn.Parameter(target)
    for _ in range(STEPS):
        average.update_parameters(model)
    averaged = average.module.weight
    assert isinstance(averaged, kind)
    moved = (averaged.detach().double() - start).mul(torch.sign(start)).mean()
    assert 0.009 < moved < 0.011
    torch.testing.assert_close(average.module.bias, model.bias)


def test_equal_weights_leave_every_code() -> None:
    model = layer(Int8Weight)
    average = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    before = [part.clone() for part in average.module.weight.parts()]
    for _ in range(3):
        average.update_parameters(model)
    for part, was in zip(average.module.weight.parts(), before, strict=True):
        assert torch.equal(part, was)


def test_a_dense_average_of_quantised_weights_is_exact() -> None:
    model = layer(Int8Weight)
    dense = nn.Linear(64, 32)
    dense.load_state_dict({"weight": model.weight.detach() * 2.0, "bias": model.bias.detach()})
    average = AveragedModel(dense, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(dense)
    average.update_parameters(model)
    expected = model.weight.dequantize() * (2.0 * 0.9 + 0.1)
    torch.testing.assert_close(average.module.weight, expected)


def test_other_changes_in_place_are_still_refused() -> None:
    model = layer(Int8Weight)
    with torch.no_grad(), pytest.raises(ValueError, match="would change an INT8 weight"):
        torch._foreach_add_([model.weight], 1.0)
