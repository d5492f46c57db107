"""SwitchLoRA: exchanges of vectors, what is held afterwards, and where candidates live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model, trained
from torch import Tensor, nn

from lowrank.optimizers import build
from lowrank.optimizers.layers import SwitchedLinear
from lowrank.optimizers.methods.switchlora import interval

OPTIONS: dict[str, Any] = {"switch_interval": 10.0, "descent_rate": 10.0, "total_steps": 100}


def made(**options: Any) -> Any:
    model = tiny_model(dtype=torch.float64)
    return model, build("switchlora_adamw", model, lr=1e-2, rank=4, **{**OPTIONS, **options})


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
    model, optimizer = made(switch_interval=16.0, freeze_steps=5)
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
    model, optimizer = made(switch_interval=12.0, descent_rate=0.5, total_steps=200)
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


def test_gradients_are_never_written_to() -> None:
    """What is held is left out of the update, and stays in the user's gradient."""
    model, optimizer = made(switch_interval=10.0, freeze_steps=5)
    held = 0
    for step in range(30):
        set_gradients(model, step)
        grads = [(param, param.grad, param.grad.clone()) for param in trained(model)]
        optimizer.step()
        held += sum(
            int(state["held"].sum()) for state in optimizer.state.values() if "held" in state
        )
        for param, grad, value in grads:
            assert param.grad is grad
            assert torch.equal(grad, value)
    assert held


def test_held_vectors_stay_with_one_factor_that_is_not_finite() -> None:
    """The other one's step is taken: its held vectors have no gradient there, either."""
    model, optimizer = made(switch_interval=10.0, freeze_steps=5)
    layer = model.self_attn["q_proj"]
    for step in range(40):
        set_gradients(model, step)
        held = optimizer.state[layer.rows_b]["held"] > 0
        if held.any():
            layer.rows_a.grad.fill_(torch.inf)
            before = layer.rows_b.detach().clone()
            with pytest.warns(UserWarning, match="non-finite gradient"):
                optimizer.step()
            assert torch.equal(layer.rows_b[held], before[held])
            assert not torch.equal(layer.rows_b[~held], before[~held])
            return
        optimizer.step()
    raise AssertionError("nothing was held")
