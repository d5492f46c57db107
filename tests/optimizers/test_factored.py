"""Factored layers and the schedules on them, against plain-tensor references."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import matrix, set_gradients, tiny_model
from torch import Tensor, nn

from lowrank.optimizers import (
    LayerEvent,
    build,
    convert,
    dense_state_dict,
    expected_state_bytes,
    merge,
    param_groups,
    state_bytes,
)
from lowrank.optimizers.layers import FactoredLinear
from lowrank.optimizers.layers.convert import factored_layers
from lowrank.optimizers.layers.optimizer import FactoredAdamW
from lowrank.optimizers.methods.low_rank import refactor_

#: Each method with options under which something happens every few steps.
METHODS: dict[str, dict[str, Any]] = {
    "sst_adamw": {"update_proj_gap": 2},
    "sltrain_adamw": {"density": 0.1, "refactor_gap": 3},
    "low_rank_adamw": {"refactor_gap": 3},
    "loqt_adamw": {"update_proj_gap": 2, "weight_format": None, "basis_format": None},
    "relora_adamw": {"update_proj_gap": 3, "reset": "zero"},
    "switchlora_adamw": {"switch_interval": 10.0, "descent_rate": 10.0, "total_steps": 100},
}
methods = pytest.mark.parametrize("name", METHODS)


def made(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = tiny_model(dtype=dtype)
    optimizer = build(name, model, **{"lr": 1e-2, "rank": 4, **METHODS[name], **options})
    assert isinstance(optimizer, FactoredAdamW)
    return model, optimizer


def effective(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.effective_weight() for name, layer in factored_layers(model)}


@methods
def test_conversion_keeps_the_function_where_promised(name: str) -> None:
    dense, model = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    exact = {"weight_format": None} if name == "loqt_adamw" else {}
    convert(name, model, rank=4, **exact)
    tokens = torch.randint(0, 32, (3, 5))
    if name not in ("low_rank_adamw", "sltrain_adamw"):
        torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-12, atol=1e-12)
    assert sum(isinstance(m, FactoredLinear) for m in model.modules()) == 3
    assert convert(name, model, rank=4) is model  # what is converted stays


@methods
def test_events_leave_the_effective_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made(name)
    events: list[LayerEvent] = []
    optimizer.register_event_hook(events.append)
    worst = 0.0
    # SST's vectors are normalised after each step as well, which is part of its update
    for hook in ("_redecompose", "_resample") if name == "sst_adamw" else ("_before", "_after"):
        plain = getattr(optimizer, hook)

        def watched(*args: Any, plain: Any = plain) -> Any:
            nonlocal worst
            before = effective(model)
            result = plain(*args)
            for key, now in effective(model).items():
                worst = max(worst, float((now - before[key]).norm() / before[key].norm()))
            return result

        monkeypatch.setattr(optimizer, hook, watched)
    for step in range(12):
        set_gradients(model, step)
        optimizer.step()
    assert len(events) >= 4
    assert {event.layers for event in events} <= {1, 2, 3}
    assert worst < 1e-12


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_dense_exact_and_idempotent(name: str, dtype: torch.dtype) -> None:
    model, optimizer = made(name, dtype)
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    expected = {key: weight.to(dtype) for key, weight in effective(model).items()}
    saved = dense_state_dict(model)
    biases = {key: layer.bias for key, layer in factored_layers(model)}
    assert merge(model) is model
    for key, weight in expected.items():
        layer = model.get_submodule(key)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        assert torch.equal(saved[f"{key}.weight"], weight)
        assert layer.bias is biases[key]
    again = {key: value.clone() for key, value in model.state_dict().items()}
    merge(model)
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    assert saved.keys() == tiny_model().state_dict().keys()


@methods
@pytest.mark.parametrize("rank", [3, 16, 100])
def test_any_rank_trains_and_counts_its_bytes(name: str, rank: int) -> None:
    formula = expected_state_bytes(name, tiny_model(), **{**METHODS[name], "rank": rank})
    model = tiny_model()
    optimizer = build(name, model, lr=1e-2, **{**METHODS[name], "rank": rank})
    for step in range(8):
        set_gradients(model, step)
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
    assert state_bytes(optimizer) == formula


@methods
def test_by_hand_equals_build(name: str) -> None:
    first, by_build = made(name)
    second = convert(name, tiny_model(dtype=torch.float64), rank=4, **METHODS[name])
    layers = ("density", "weight_format", "basis_format")
    own = {key: value for key, value in METHODS[name].items() if key not in layers}
    by_hand = type(by_build)(param_groups(second), lr=1e-2, **own)
    set_gradients(second, 0)
    with pytest.raises(ValueError, match=r"accepted is attach\(model\)"):
        by_hand.step()
    by_hand.attach(second)
    for step in range(7):
        for model, optimizer in ((first, by_build), (second, by_hand)):
            set_gradients(model, step)
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_attach_refuses_another_model() -> None:
    _, optimizer = made("relora_adamw")
    other, _ = made("relora_adamw")
    with pytest.raises(ValueError, match="is not a factor of a layer of this TinyBlock"):
        optimizer.attach(other)


def test_conversions_do_not_mix() -> None:
    model = convert("relora_adamw", tiny_model(), rank=4)
    with pytest.raises(ValueError, match=r"accepted for SwitchedLinear are dense"):
        convert("switchlora_adamw", model, rank=4)


@methods
def test_accumulation_clipping_checkpointing_and_bf16(name: str) -> None:
    model, optimizer = made(name, torch.bfloat16)
    tokens = torch.randint(0, 32, (4, 8))
    for _ in range(4):
        for part in tokens.split(2):
            hidden = torch.utils.checkpoint.checkpoint(model, part, use_reentrant=False)
            nn.functional.cross_entropy(hidden.flatten(0, 1).float(), part.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("relora_adamw", "update_proj_gap", 0),
        ("relora_adamw", "reset", "all"),
        ("relora_adamw", "prune_ratio", 1.5),
        ("relora_adamw", "rank", 0),
        ("switchlora_adamw", "switch_interval", 9.0),
        ("switchlora_adamw", "rank", 1),
        ("switchlora_adamw", "total_steps", 0),
        ("low_rank_adamw", "refactor_gap", 0),
    ],
)
def test_bad_options_raise(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        build(name, tiny_model(), **{"rank": 4, option: value})


# Refactorisation


def test_refactorisation_balances_the_factors() -> None:
    b, a = 100 * matrix(9, 3, 1), matrix(3, 7, 2)
    before = b @ a
    refactor_(b, a)
    torch.testing.assert_close(b @ a, before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=1e-10, atol=1e-10)
    bad = copy.deepcopy(b)
    bad[0, 0] = math.nan
    kept = bad.clone()
    refactor_(bad, a)
    assert torch.equal(bad.nan_to_num(), kept.nan_to_num())
