"""What every optimizer does with gradients that are missing, strided, huge or broken."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from support import set_gradients, tiny_model, trained, weights
from table import Row, assert_close, every, every_with, representative, train, weight_of
from torch import Tensor, nn

from lowrank.optimizers import AdamW, build
from lowrank.optimizers.engine import plain
from lowrank.optimizers.engine import step as stepping
from lowrank.optimizers.engine.batching import read_steps
from lowrank.optimizers.engine.gradients import SkippedUpdates
from lowrank.optimizers.engine.processes import ALONE


@representative
def test_missing_and_empty_gradients_are_left_alone(row: Row) -> None:
    model = tiny_model()
    model.mlp["empty"] = nn.Linear(4, 4, bias=False)
    model.mlp["empty"].weight = nn.Parameter(torch.zeros(4, 0))
    optimizer = row.build(model)
    set_gradients(model, 0)
    still = weight_of(model.self_attn["q_proj"])
    still.grad = None
    before = still.detach().clone()
    optimizer.step()
    assert torch.equal(before, still)
    assert int(optimizer.state[still]["step"]) == 0
    optimizer.zero_grad()
    optimizer.step()


@every
def test_non_contiguous_weights_and_gradients(row: Row) -> None:
    plain, strided = tiny_model(), tiny_model()
    for param in trained(strided):
        if param.dim() == 2:
            param.data = param.data.t().contiguous().t()
    first, second = row.build(plain), row.build(strided)
    for step in range(4):
        for model, optimizer in ((plain, first), (strided, second)):
            set_gradients(model, step)
            for param in trained(model):
                if model is strided and param.dim() == 2:
                    param.grad = param.grad.t().contiguous().t()
            optimizer.step()
    assert_close(plain, strided, rtol=1e-4, atol=max(row.slack, 1e-5))


@representative
def test_sparse_gradients_raise(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    model.embed_tokens.weight.grad = torch.zeros(32, 16).to_sparse()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has a sparse gradient"):
        optimizer.step()


@every_with("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_leave_the_parameter_as_it_is(row: Row, bad: float) -> None:
    model = tiny_model()
    optimizer = row.build(model, **row.in_turn)
    train(model, optimizer, range(3))  # the next step refreshes
    hit = (weight_of(model.self_attn["q_proj"]), model.norm.weight)
    set_gradients(model, 3)
    for param in hit:
        param.grad.view(-1)[5] = bad
    before = [copy.deepcopy(optimizer.state[p]) for p in hit], [p.detach().clone() for p in hit]
    with pytest.warns(UserWarning, match="non-finite gradient of"):
        optimizer.step()
    for param, state, old in zip(hit, *before, strict=True):
        assert torch.equal(param, old)
        for key, value in state.items():
            if key == "calls":  # of `step`
                continue
            now = optimizer.state[param][key]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(4, 7))
    assert all(param.isfinite().all() for param in trained(model))
    if row.projects and row.refits in ("solver", "draw"):
        assert optimizer.state[hit[0]]["refreshed_at"] >= 3  # the missed refresh was made up


@every
def test_zero_gradients_from_the_start(row: Row) -> None:
    model = row.prepare(tiny_model())
    optimizer = row.build(model, weight_decay=0.0, **row.quiet)
    before = weights(model)
    for param in trained(model):
        param.grad = torch.zeros_like(param)
    for _ in range(2):
        optimizer.step()
    # SST's step normalises columns anew, by norms whose last bit depends on the processor.
    limit = 1e-6 if row.name == "sst_adamw" else 0.0
    for old, param in zip(before, trained(model), strict=True):
        torch.testing.assert_close(param.detach(), old, rtol=0.0, atol=limit)
    train(model, optimizer, range(3))
    for old, param in zip(before, trained(model), strict=True):
        assert param.isfinite().all()
        assert torch.equal(old, param) is (param in row.still_factors(model))


@every
@pytest.mark.parametrize("scale", [1e-18, 1e18], ids=str)
def test_extreme_gradient_scales(row: Row, scale: float) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    for step in range(4):
        set_gradients(model, step, scale)
        optimizer.step()
    assert all(param.isfinite().all() for param in trained(model))


@representative
def test_grad_scaler_skips_without_advancing(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    set_gradients(model, 0)
    scaler.scale(torch.ones(()))
    next(model.parameters()).grad.view(-1)[0] = math.inf
    before = weights(model)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())
    set_gradients(model, 0)
    scaler.step(optimizer)
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


@every
def test_fp16_autocast_under_a_grad_scaler_skips_cleanly(row: Row) -> None:
    """A scale that overflows is halved until it doesn't; what is skipped leaves no trace."""
    model = tiny_model()
    optimizer = row.build(model, **row.in_turn)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=100)
    tokens = torch.arange(24).reshape(3, 8) % 32
    before, taken = [value.clone() for value in model.state_dict().values()], 0
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(tokens)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            taken += 1
        elif not taken:
            now = model.state_dict().values()
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert all(int(state["step"]) == taken for state in optimizer.state.values())
        if taken == 3:
            break
    assert taken == 3
    assert 1 < scale < 2.0**30
    assert optimizer.skipped == 0
    assert all(value.isfinite().all() for value in trained(model))


@every
def test_updates_that_are_left_out_are_counted(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, **row.in_turn)
    assert optimizer.skipped == 0
    assert optimizer.skipped_by_name() == {}
    often, once = weight_of(model.self_attn["q_proj"]), model.norm.weight
    called = {param: name for name, param in model.named_parameters()}
    train(model, optimizer, range(1))
    for k in range(4):
        set_gradients(model, k + 1)
        often.grad.view(-1)[5] = math.nan
        if k == 2:
            once.grad[0] = math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("error" if k else "ignore")
            optimizer.step()
    assert optimizer.skipped == 5
    assert list(optimizer.skipped_by_name().items()) == [(called[often], 4), (called[once], 1)]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved.keys() == {"state", "param_groups"}
    optimizer.load_state_dict(saved)
    assert optimizer.skipped == 5  # of this process, whatever was loaded
    assert copy.deepcopy(optimizer).skipped == 0


def test_unnamed_parameters_are_counted_by_place() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = AdamW([{"params": weights[:1]}, {"params": weights[1:]}])
    for weight in weights:
        weight.grad = torch.ones(3)
    weights[2].grad[0] = math.nan
    with pytest.warns(UserWarning, match=r"non-finite gradient of the parameter of shape \(3,\)"):
        optimizer.step()
    assert optimizer.skipped_by_name() == {"group1.1": 1}


def test_counts_let_go_of_what_has_left() -> None:
    """Both those read in each step and those that wait on a device."""
    kept, gone = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    groups = [{"params": [kept, gone], "param_names": ["kept", "gone"]}]
    skipped, bad = SkippedUpdates(), torch.full((2, 3), math.nan)
    skipped.gate(bad.clone(), [kept, gone], ["kept", "gone"])
    with pytest.warns(UserWarning, match="non-finite gradient of kept"):
        assert skipped.by_name(groups) == {"kept": 1, "gone": 1}
    skipped.gate(bad.clone(), [gone, kept], ["gone", "kept"])
    skipped.gate(bad.clone(), [kept, gone], ["kept", "gone"])
    assert skipped.usable([bad[0]], [gone], ["gone"], [ALONE]) == []
    alive = weakref.ref(gone)
    groups[0] = {"params": [kept], "param_names": ["kept"]}
    skipped.keep_only([kept])
    del gone
    gc.collect()
    assert alive() is None
    assert skipped.total == 7
    assert skipped.by_name(groups) == {"kept": 3}
    assert skipped._unread == {}


def test_a_parameter_that_left_is_freed() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW([{"params": weights[:1]}, {"params": weights[1:]}])
    for weight in weights:
        weight.grad = torch.full((3,), math.nan)
    with pytest.warns(UserWarning, match="non-finite gradient"):
        optimizer.step()
    alive = weakref.ref(weights[1])
    del optimizer.param_groups[1], weight
    optimizer.state.pop(weights.pop())
    optimizer.step()
    gc.collect()
    assert alive() is None
    assert (optimizer.skipped, optimizer.skipped_by_name()) == (3, {"group0.0": 2})


@pytest.mark.parametrize("capturable", [False, True])
def test_step_counts_are_read_once_a_group(
    capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device each reading is a synchronisation."""
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4, capturable=capturable)
    train(model, optimizer, range(2))
    read: list[int] = []

    def counting(states: list[dict[str, Tensor]]) -> list[int]:
        read.append(len(states))
        return read_steps(states)

    for module in (stepping, plain):
        monkeypatch.setattr(module, "read_steps", counting)
    train(model, optimizer, range(2, 3))
    # Captured steps of plain parameters are not told apart by their counts.
    assert read == ([3] if capturable else [3, 2, 3])
