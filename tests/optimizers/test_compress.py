"""Ranks by one threshold on all spectra, factors that load again, and fine-tuning of them alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import build, compress_weights, convert, load_compressed, merge
from lowrank.optimizers.layers import LowRankLinear

SIDES = {"a": (12, 12), "b": (12, 20), "c": (20, 12)}
#: Singular values fall as these powers: "a" is steep, "c" flat.
DECAYS = {"a": 0.5, "b": 0.75, "c": 0.97}


def weight_of(name: str) -> Tensor:
    m, n = SIDES[name]
    u, _, vh = torch.linalg.svd(matrix(m, n, ord(name)), full_matrices=False)
    return (u * DECAYS[name] ** torch.arange(min(m, n))) @ vh * (3 if name == "b" else 1)


def model_of() -> Any:
    torch.manual_seed(0)
    layers = {name: nn.Linear(n, m, bias=name == "a") for name, (m, n) in SIDES.items()}
    model = nn.ModuleDict({"mlp": nn.ModuleDict(layers), "head": nn.Linear(20, 4)}).double()
    with torch.no_grad():
        for name in SIDES:
            model["mlp"][name].weight.copy_(weight_of(name))
    return model


def forward(model: Any, x: Tensor) -> Tensor:
    mlp = model["mlp"]
    return model["head"](mlp["c"](mlp["b"](torch.cat([mlp["a"](x), x[:, :8]], 1))))


def ranks(threshold: float) -> dict[str, int]:
    """Values of at least the threshold's share of the first, by counting."""
    return {
        name: sum(DECAYS[name] ** i >= threshold * (1 - 1e-9) for i in range(12)) for name in SIDES
    }


def test_one_threshold_for_all_matrices_meets_the_reduction() -> None:
    model = model_of()
    done = compress_weights(model, reduction=0.5)
    assert [own.name for own in done.matrices] == ["mlp.a", "mlp.b", "mlp.c"]
    expected = ranks(done.threshold)
    assert {own.name[-1]: own.rank for own in done.matrices} == expected
    assert sum(expected.values()) == 18 == round(36 * (1 - done.reduction))
    # The threshold above would drop one more.
    assert [own.low_rank for own in done.matrices] == [expected[n] <= 6 for n in SIDES]
    for own in done.matrices:
        layer = model["mlp"][own.name[-1]]
        assert isinstance(layer, LowRankLinear) is own.low_rank
        weight = layer.effective_weight() if own.low_rank else layer.weight
        error = (weight - weight_of(own.name[-1])).norm() / weight_of(own.name[-1]).norm()
        assert float(error) == pytest.approx(own.error, abs=1e-9)
        if own.low_rank:
            assert torch.linalg.matrix_rank(weight) == own.rank
            torch.testing.assert_close(  # balanced
                layer.lora_b.mT @ layer.lora_b, layer.lora_a @ layer.lora_a.mT
            )


@pytest.mark.parametrize("entries", [0.9, 0.6, 0.35])
def test_a_budget_of_entries_is_met_by_the_least_threshold(entries: float) -> None:
    done = compress_weights(model_of(), entries=entries)
    assert done.entries <= entries
    dense = {name: m * n for name, (m, n) in SIDES.items()}

    def left(threshold: float) -> int:
        kept = ranks(threshold)
        factors = {n: kept[n] * sum(SIDES[n]) for n in SIDES}
        return sum(
            factors[n] if kept[n] <= 6 and factors[n] < dense[n] else dense[n] for n in SIDES
        )

    shares = sorted({DECAYS[name] ** i for name in SIDES for i in range(12)})
    least = next(share for share in shares if left(share) <= entries * sum(dense.values()))
    assert done.threshold == pytest.approx(least)
    assert left(least) == round(done.entries * sum(dense.values()))


def test_factors_are_only_where_they_are_fewer_entries() -> None:
    done = compress_weights(model_of(), reduction=0.4, low_rank=0.0)
    for own in done.matrices:
        assert own.low_rank is (own.rank * (own.rows + own.columns) < own.rows * own.columns)


def test_a_state_dict_loads_again_and_merges() -> None:
    model = model_of()
    compress_weights(model, reduction=0.5)
    x = matrix(5, 12, 1)
    expected = forward(model, x)
    again = load_compressed(model_of(), copy.deepcopy(model.state_dict()))
    assert torch.equal(forward(again, x), expected)
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    torch.testing.assert_close(forward(merge(again), x), expected)
    assert all(type(layer) is nn.Linear for layer in again["mlp"].values())


def test_fine_tuning_trains_the_factors_alone() -> None:
    model = model_of()
    done = compress_weights(model, reduction=0.5)
    optimizer = build("low_rank_adamw", model, lr=1e-2)
    factors = {param for group in optimizer.param_groups for param in group["params"]}
    assert len(factors) == 2 * sum(own.low_rank for own in done.matrices)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    x, target, losses = matrix(16, 12, 1), matrix(16, 4, 2), []
    for _ in range(30):
        loss = (forward(model, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) is (param not in factors)


def test_without_freezing_all_is_trained() -> None:
    model = model_of()
    compress_weights(model, reduction=0.5, freeze=False)
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "accepted is one of them"),
        ({"reduction": 0.5, "entries": 0.5}, "accepted is one of them"),
        ({"reduction": 1.0}, "reduction=1"),
        ({"entries": 0.0}, "entries=0"),
        ({"reduction": 0.99}, "leaves less than one for each of 3 matrices"),
        ({"entries": 0.01}, "which is rank 1 everywhere"),
        ({"reduction": 0.02}, "no matrix loses 50% of its rank; mlp.a is nearest"),
        ({"reduction": 0.5, "low_rank": 1.0}, "low_rank=1"),
        ({"reduction": 0.5, "patterns": "attention"}, "accepted are patterns"),
    ],
    ids=str,
)
def test_what_cant_be_done_leaves_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress_weights(model, **options)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(param.requires_grad for param in model.parameters())


def test_only_dense_models_of_finite_weights() -> None:
    with pytest.raises(ValueError, match="with factors: accepted is a dense model"):
        compress_weights(convert("low_rank_adamw", model_of(), rank=2), reduction=0.5)
    model = model_of()
    with torch.no_grad():
        model["mlp"]["b"].weight.zero_()
    with pytest.raises(ValueError, match=r"mlp\.b\.weight is zero or not finite"):
        compress_weights(model, reduction=0.5)
    with pytest.raises(ValueError, match="has no factors"):
        load_compressed(model_of(), model_of().state_dict())
    state = {"mlp.x.lora_a": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"mlp\.x, which is no linear layer"):
        load_compressed(model_of(), state)
