"""GradNormLoRP equals a plain fp64 reference of its rule, and what wrong use does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from references import down, galore_bases, up
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    build,
    expected_state_bytes,
    expected_weight_bytes,
)

SHAPES = ((14, 9), (9, 14), (11, 11))
OPTIONS: dict[str, Any] = {"rank": 4, "update_proj_gap": 5, "scale": 0.5, "refresh": "svd"}


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2)) for k in range(steps)]


def start(shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(0.2 * matrix(*shape, 0))


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: Sequence[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


def lengths(w: Tensor) -> Tensor:
    return w.square().sum(1, keepdim=True).sqrt()


def reference(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    proj_type: str = "std",
    magnitude_scale: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> Tensor:
    """Directions by GaLore, lengths by Adam, row by row."""
    w = weight.detach().double().clone()
    m = v = mg = vg = torch.zeros(1, dtype=torch.float64)
    bases: Any = (None, None)
    for k, g in enumerate(grads):
        g = g.double()
        if k % OPTIONS["update_proj_gap"] == 0:
            bases = galore_bases(g, OPTIONS["rank"], proj_type)
        unit = w / lengths(w)
        r, d = down(g, *bases), (g * unit).sum(1, keepdim=True)
        m, v = betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r * r
        mg, vg = betas[0] * mg + (1 - betas[0]) * d, betas[1] * vg + (1 - betas[1]) * d * d
        s = lr * (1 - betas[1] ** (k + 1)) ** 0.5 / (1 - betas[0] ** (k + 1))
        direction = w - s * OPTIONS["scale"] * up(m / (v.sqrt() + eps), *bases)
        length = lengths(w) - s * magnitude_scale * mg / (vg.sqrt() + eps)
        length = torch.maximum(length, lengths(w) / 2)
        w = length * direction / lengths(direction) * (1 - lr * weight_decay)
    return w


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_equals_the_reference(shape: tuple[int, int], proj_type: str) -> None:
    weight, grads = start(shape), gradients(shape)
    own = {"proj_type": proj_type, "magnitude_scale": 0.7}
    expected = reference(grads, weight, lr=0.02, weight_decay=0.1, **own)
    group = {"params": [weight], **OPTIONS, **own}
    made = GradNormLoRPAdamW([group], lr=0.02, weight_decay=0.1)
    torch.testing.assert_close(train(made, weight, grads), expected, rtol=1e-8, atol=1e-10)


def test_lengths_stay_without_their_updates() -> None:
    weight, grads = start((14, 9)), gradients((14, 9))
    before = lengths(weight.detach())
    made = GradNormLoRPAdamW([{"params": [weight], **OPTIONS, "magnitude_scale": 0.0}], lr=0.02)
    assert not torch.equal(train(made, weight, grads), start((14, 9)))
    torch.testing.assert_close(lengths(weight.detach()), before)


def test_lengths_alone_without_a_scale() -> None:
    weight, grads = start((14, 9)), gradients((14, 9))
    before = weight.detach().clone()
    made = GradNormLoRPAdamW(
        [{"params": [weight], **OPTIONS, "scale": 0.0, "magnitude_scale": 1.0}], lr=0.02
    )
    after = train(made, weight, grads)
    torch.testing.assert_close(after / lengths(after), before / lengths(before))
    assert ((lengths(after) / lengths(before) - 1).abs() > 0.2).all()


def test_a_row_of_zeros_has_no_direction() -> None:
    weight, grads = start((14, 9)), gradients((14, 9), 1)
    plain = start((14, 9))
    for param in (weight, plain):
        with torch.no_grad():
            param[3] = 0
    train(GradNormLoRPAdamW([{"params": [weight], **OPTIONS}], lr=0.02), weight, grads)
    train(GaLoreAdamW([{"params": [plain], **OPTIONS}], lr=0.02), plain, grads)
    torch.testing.assert_close(weight[3], plain[3])
    assert weight.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_read_in_chunks(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(64, 48, bias=False)})
    options: dict[str, Any] = {"rank": 8, "lr": 0.01}
    optimizer = build("gradnorm_lorp_adamw", model, weight_bits=bits, **options)
    weight = model["attn"].weight
    before = weight.detach().dequantize().clone()
    weight.grad = matrix(48, 64, 1).float()
    optimizer.step()
    after = weight.detach().dequantize()
    change = (after - before).norm() / before.norm()
    assert 0.01 < change < 0.5
    assert expected_weight_bytes("gradnorm_lorp_adamw", model) < 48 * 64 * 2


def test_state_is_galores_and_two_numbers_a_row() -> None:
    model = nn.ModuleDict({"attn": nn.Linear(40, 24, bias=False)})
    own = expected_state_bytes("gradnorm_lorp_adamw", model, rank=4)
    assert own == expected_state_bytes("galore_adamw", model, rank=4) + 2 * 4 * 24


def test_what_it_goes_with() -> None:
    group = {"params": [start((14, 9))], **OPTIONS, "residual": "weight_normalised"}
    with pytest.raises(ValueError, match="accepted are rules with betas and eps"):
        GaLoreAdafactor([group])
    with pytest.raises(ValueError, match="capturable=True: accepted"):
        GaLoreAdamW([group], capturable=True)
    with pytest.raises(ValueError, match="magnitude_scale=-1"):
        GradNormLoRPAdamW([{**group, "magnitude_scale": -1.0}])
    with pytest.raises(ValueError, match=r"magnitude_scale=0\.5: accepted with residual="):
        GaLoreAdamW([{"params": [start((14, 9))], **OPTIONS, "magnitude_scale": 0.5}])
