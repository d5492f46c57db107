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
from lowrank.optimizers.layers import FactoredLinear, LowRankLinear, SwitchedLinear
from lowrank.optimizers.layers.convert import factored_layers
from lowrank.optimizers.layers.optimizer import FactoredAdamW
from lowrank.optimizers.methods.low_rank import refactor_
from lowrank.optimizers.methods.relora import prune_
from lowrank.optimizers.methods.switchlora import interval

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


# ReLoRA


def adam(param: Tensor, grad: Tensor, state: list[Tensor], step: int, lr: float) -> Tensor:
    """Torch's Adam on plain tensors."""
    state[0] = 0.9 * state[0] + 0.1 * grad
    state[1] = 0.999 * state[1] + 0.001 * grad**2
    corrected = state[0] / (1 - 0.9**step), state[1] / (1 - 0.999**step)
    return param - lr * corrected[0] / (corrected[1].sqrt() + 1e-8)


def test_relora_equals_its_reference() -> None:
    """Three merges: factors by Adam, whose step count goes on and whose moments are zeroed."""
    linear = nn.ModuleDict({"mlp": nn.Linear(6, 5, dtype=torch.float64)})
    optimizer = build("relora_adamw", linear, lr=1e-2, rank=2, alpha=4.0, **METHODS["relora_adamw"])
    layer = linear["mlp"]
    frozen, a, b = layer.frozen.clone(), layer.lora_a.detach().clone(), torch.zeros(5, 2).double()
    moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in (a, b)]
    for step in range(1, 10):
        grads = matrix(2, 6, step), matrix(5, 2, 100 + step)
        layer.lora_a.grad, layer.lora_b.grad = (grad.clone() for grad in grads)
        optimizer.step()
        a = adam(a, grads[0], moments[0], step, 1e-2)
        b = adam(b, grads[1], moments[1], step, 1e-2)
        if step % 3 == 0:
            frozen = frozen + 2.0 * b @ a
            a, b = layer.lora_a.detach().clone(), torch.zeros_like(b)  # A is drawn anew
            moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in (a, b)]
            assert a.abs().max() <= 1 / math.sqrt(6)
        torch.testing.assert_close(layer.frozen, frozen, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.lora_a.detach(), a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.lora_b.detach(), b, rtol=1e-10, atol=1e-12)


def test_relora_merges_small_products_into_bf16() -> None:
    """What lies below half a unit of W_f's last place is kept in the mean."""
    linear = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(linear.weight, 1.0)
    layer = LowRankLinear(linear, 0, rank=1, alpha=1.0)
    for seed in range(20):
        nn.init.constant_(layer.lora_a, 2.0**-5)
        nn.init.constant_(layer.lora_b, 2.0**-6)  # 2^-11 a merge; 1's neighbour is 2^-7 away
        layer.merge(seed)
    assert layer.frozen.float().mean() == pytest.approx(1 + 20 * 2.0**-11, rel=2e-4)


def test_relora_draws_are_equal_for_equal_seeds() -> None:
    first, one = made("relora_adamw", seed=5)
    second, two = made("relora_adamw", seed=5)
    torch.manual_seed(99)  # draws don't depend on the process's own generator
    for model, optimizer in ((first, one), (second, two)):
        torch.rand(3)
        for step in range(4):
            set_gradients(model, step)
            optimizer.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("how", ["zero", "random", "magnitude", "none"])
def test_pruning(how: str) -> None:
    moment = matrix(40, 50, 3)
    before = moment.clone()
    prune_(moment, how, 0.9, seed=4)
    kept = moment != 0
    assert torch.equal(moment[kept], before[kept])
    share = {"zero": 0.0, "random": 0.1, "magnitude": 0.1, "none": 1.0}[how]
    assert kept.double().mean() == pytest.approx(share, abs=0.03 if how == "random" else 1e-9)
    if how == "magnitude":
        assert before[kept].abs().min() >= before[~kept].abs().max()


# SwitchLoRA


def test_switch_exchanges_vectors_and_keeps_the_old_ones() -> None:
    linear = nn.Linear(7, 6, dtype=torch.float64)
    layer = SwitchedLinear(linear, 3, rank=4)
    torch.testing.assert_close(layer.effective_weight(), linear.weight.detach())
    old, params = layer.rows_a.detach().clone(), layer.selected[0].clone()
    with torch.no_grad():
        layer.rows_a.add_(1.0)  # as if trained
    before, candidates = layer.effective_weight(), layer.candidates_a.clone()
    places = layer.switch(0, 3, 2, seed=0)
    assert places.tolist() == [3, 0]
    torch.testing.assert_close(layer.effective_weight(), before, rtol=1e-12, atol=1e-12)
    fresh = layer.selected[0][places]
    assert torch.equal(layer.rows_a[places], candidates[fresh])
    assert torch.equal(layer.candidates_a[params[places]], old[places] + 1.0)
    assert sorted(set(layer.selected[0].tolist())) == sorted(layer.selected[0].tolist())


def test_switch_renews_and_holds_the_counterpart() -> None:
    model, optimizer = made("switchlora_adamw", switch_interval=16.0, freeze_steps=5)
    layer = model.self_attn["q_proj"]
    held_at: dict[int, Tensor] = {}
    for step in range(30):
        set_gradients(model, step)
        before = layer.rows_b.detach().clone()
        optimizer.step()
        state = optimizer.state[layer.rows_b]
        held = state["held"] > 0
        if held.any():
            row = int(held.nonzero()[0])
            if step > 0 and state["held"][row] < 4:
                assert torch.equal(before[row], layer.rows_b[row])
                assert not state["exp_avg"][row].any()
            held_at[step] = held
        assert (state["row_steps"] <= step + 1).all()
    assert held_at


def test_switching_falls_to_three_tenths() -> None:
    group = {"switch_interval": 40.0, "descent_rate": 0.1, "total_steps": 1000}
    assert interval(group, 99) == pytest.approx(40 / 0.3)
    model, optimizer = made(
        "switchlora_adamw", switch_interval=12.0, descent_rate=0.5, total_steps=200
    )
    steps: list[int] = []
    optimizer.register_event_hook(lambda event: steps.append(event.step))
    for step in range(200):
        set_gradients(model, step)
        optimizer.step()
    early, late = sum(s < 50 for s in steps), sum(s >= 150 for s in steps)
    assert late < 0.6 * early


def test_offloaded_candidates_stay_on_the_cpu_and_are_saved() -> None:
    layer = SwitchedLinear(nn.Linear(8, 6), 0, rank=2, offload=True)
    layer.to(torch.bfloat16)
    assert layer.candidates_a.dtype == torch.bfloat16
    assert layer.selected.dtype == torch.int64
    assert {"candidates_a", "candidates_b", "selected", "frozen"} <= layer.state_dict().keys()


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


# Heads


def test_each_head_sees_its_share_of_the_batch() -> None:
    linear = nn.Linear(10, 6, dtype=torch.float64)
    layer = LowRankLinear.of(linear, 0, rank=2, alpha=3.0, heads=3)
    with torch.no_grad():
        layer.lora_b.copy_(matrix(6, 6, 1))
    x = matrix(6 * 5, 10, 2).view(6, 5, 10)
    y = layer(x)
    for head in range(3):
        rows = slice(2 * head, 2 * head + 2)
        product = layer.lora_b[:, rows] @ layer.lora_a[rows]
        alone = nn.functional.linear(x[rows], linear.weight + 1.5 * product, linear.bias)
        torch.testing.assert_close(y[rows], alone)
    layer.eval()
    mean = nn.functional.linear(x, layer.effective_weight(), linear.bias)
    torch.testing.assert_close(layer(x), mean)
    before = layer.effective_weight()
    layer.merge(1)
    torch.testing.assert_close(layer.effective_weight(), before)
    assert not layer.lora_b.any()
    layer.train()
    with pytest.raises(ValueError, match=r"a batch of 4 for 3 heads"):
        layer(x[:4])


def test_heads_train_merge_and_count_their_bytes() -> None:
    options = {"rank": 4, "heads": 2, "update_proj_gap": 3}
    model = tiny_model()
    formula = expected_state_bytes("relora_adamw", model, **options)
    optimizer = build("relora_adamw", model, lr=1e-2, **options)
    tokens = torch.randint(0, 32, (4, 8))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert state_bytes(optimizer) == formula
    layer = model.self_attn["q_proj"]
    assert layer.lora_a.shape == (8, 16)
    merged = merge(model)
    assert isinstance(merged.self_attn["q_proj"], nn.Linear)
    with pytest.raises(ValueError, match="heads=0"):
        build("relora_adamw", tiny_model(), heads=0)
