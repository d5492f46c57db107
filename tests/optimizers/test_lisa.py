"""LISA equals a plain fp64 reference; draws, memory, resumption, and what wrong use does."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from references import adam
from support import matrix, tiny_model
from table import assert_same
from torch import Tensor, nn

from lowrank.cuda.noise import mix
from lowrank.optimizers import (
    AdamW,
    LisaAdamW,
    block_groups,
    build,
    expected_state_bytes,
    state_bytes,
    update_in_backward,
)
from lowrank.optimizers.blocks import blocks_of, draw_blocks

SIDE = 6


class Stack(nn.Module):
    """An embedding, a list of layers with norms, and a head."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, SIDE)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(SIDE, SIDE), "mlp": nn.Linear(SIDE, SIDE, bias=False)})
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(SIDE)
        self.head = nn.Linear(SIDE, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["mlp"](torch.relu(layer["attn"](x)))
        return self.head(self.norm(x))


def stack(layers: int = 5, dtype: torch.dtype = torch.float64) -> Stack:
    torch.manual_seed(0)
    return Stack(layers).to(dtype)


def set_gradients(model: nn.Module, step: int) -> None:
    for index, param in enumerate(model.parameters()):
        rows = len(param)
        columns = param.numel() // rows
        param.grad = matrix(rows, columns, 100 * index + step).reshape(param.shape).to(param)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def reference(
    model: nn.Module, steps: int, gap: int, turns: Sequence[set[int]], **options: Any
) -> dict[str, Tensor]:
    """AdamW on what is in its turn, at the end of which a layer's moments are dropped."""
    made = {}
    for index, (name, param) in enumerate(model.named_parameters()):
        layer, w = layer_of(name), param.detach().double().clone()
        rows, columns = len(param), param.numel() // len(param)
        grads: list[Tensor] = []
        for step in range(steps):
            if layer is not None and layer not in turns[step // gap]:
                w, grads = (adam(grads, w, **options) if grads else w), []
                continue
            grads.append(matrix(rows, columns, 100 * index + step).reshape(param.shape))
        made[name] = adam(grads, w, **options) if grads else w
    return made


def drawn(seed: int, step: int, count: int = 2, layers: int = 5) -> set[int]:
    return draw_blocks(range(layers), count, mix(seed, "active layers", step))


def test_equals_the_reference() -> None:
    model = stack()
    turns = [drawn(3, step) for step in range(0, 12, 3)]
    assert len({frozenset(turn) for turn in turns}) > 1
    assert any(a & b for a, b in pairwise(turns))  # one goes on
    expected = reference(model, 12, 3, turns, lr=0.01, eps=1e-8, weight_decay=0.0, torch_form=True)
    optimizer = build("lisa_adamw", model, lr=0.01, update_proj_gap=3, seed=3)
    train(model, optimizer, range(12))
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), expected[name], rtol=1e-9, atol=1e-11)


def test_layers_out_of_their_turn_have_no_moments_and_no_decay() -> None:
    model = stack()
    optimizer = build("lisa_adamw", model, lr=0.1, weight_decay=0.5, update_proj_gap=2)
    for start in (0, 2, 4):
        before = copy.deepcopy(model.state_dict())
        active = optimizer.active_blocks()
        assert len(active) == 2
        train(model, optimizer, range(start, start + 1))
        for name, param in model.named_parameters():
            rests = layer_of(name) not in (None, *active)
            assert torch.equal(param, before[name]) is rests
            assert (optimizer.state[param]["exp_avg"].numel() == 0) is rests
        train(model, optimizer, range(start + 1, start + 2))


def test_all_layers_are_adamw() -> None:
    first, second = stack(), stack()
    with pytest.warns(UserWarning, match="trains all of them in each period, as AdamW does"):
        every = build("lisa_adamw", first, lr=0.01, update_proj_gap=2, active_layers=5)
    train(first, every, range(7))
    train(second, build("adamw", second, lr=0.01, weight_decay=0.0), range(7))
    assert_same(first, second)


def test_memory_is_that_of_two_layers_and_of_all_else() -> None:
    model = stack(dtype=torch.float32)
    optimizer = build("lisa_adamw", model)
    layer = 2 * SIDE * SIDE + SIDE
    others = 2 * 8 * SIDE + 2 * SIDE
    steps = 4 * len(list(model.parameters()))
    expected = steps + 2 * 4 * (2 * layer + others)
    assert state_bytes(optimizer) == expected == expected_state_bytes("lisa_adamw", model)
    train(model, optimizer, range(45))
    assert state_bytes(optimizer) == expected


def test_moments_are_dropped_before_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    optimizer = build("lisa_adamw", model, update_proj_gap=2)
    turns = [drawn(0, 0), drawn(0, 2)]
    assert turns[0] - turns[1]
    layers = {id(p): layer_of(name) for name, p in model.named_parameters()}
    former = [
        weakref.ref(value.untyped_storage())
        for param, state in optimizer.state.items()
        for value in (state["exp_avg"], state["exp_avg_sq"])
        if layers[id(param)] in turns[0] - turns[1]
    ]
    alive: dict[int | None, int] = {}
    make = LisaAdamW.make_state

    def watched(self: LisaAdamW, param: Tensor, *arguments: Any) -> dict[str, Any]:
        alive[layers[id(param)]] = sum(kept() is not None for kept in former)
        return make(self, param, *arguments)

    monkeypatch.setattr(LisaAdamW, "make_state", watched)
    train(model, optimizer, range(1))
    assert not alive
    train(model, optimizer, range(1, 2))
    assert alive.keys() == turns[0] ^ turns[1]
    assert {alive[layer] for layer in turns[1] - turns[0]} == {0}


def test_draws_cover_all_layers_evenly() -> None:
    counts = torch.zeros(5)
    for step in range(3000):
        for layer in drawn(0, step):
            counts[layer] += 1
    # 1200 each, standard deviation 27
    assert (counts - 1200).abs().max() < 120


def test_draws_by_norm() -> None:
    norms = dict.fromkeys(range(4), 1.0) | {4: 4.0}
    found = [draw_blocks(range(5), 1, mix(seed), norms) for seed in range(2000)]
    share = sum(4 in own for own in found) / 2000
    assert abs(share - 0.5) < 0.05
    even = draw_blocks(range(5), 1, mix(7), dict.fromkeys(range(5), 0.0))
    assert even == draw_blocks(range(5), 1, mix(7))
    assert even == draw_blocks(range(5), 1, mix(7), dict.fromkeys(range(5), float("nan")))


def test_norm_sampling_prefers_heavy_layers() -> None:
    model = stack()
    with torch.no_grad():
        for param in model.layers[3].parameters():
            param.mul_(1e6)
    optimizer = build("lisa_adamw", model, update_proj_gap=1, sampling="norm", active_layers=1)
    turns = []
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        turns += optimizer.active_blocks()
    assert turns == [3] * 8


@pytest.mark.parametrize("sampling", ["uniform", "norm"])
def test_resumes_exactly_in_the_middle_of_a_period(sampling: str) -> None:
    options: dict[str, Any] = {"lr": 0.01, "update_proj_gap": 3, "sampling": sampling}
    straight = stack()
    train(straight, build("lisa_adamw", straight, **options), range(11))
    model = stack()
    optimizer = build("lisa_adamw", model, **options)
    train(model, optimizer, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = stack()
    again.load_state_dict(saved[0])
    other = build("lisa_adamw", again, **options)
    assert other.active_blocks() != optimizer.active_blocks()
    with warnings.catch_warnings():  # turns are no options that loading changes
        warnings.simplefilter("error")
        other.load_state_dict(saved[1])
    assert other.active_blocks() == optimizer.active_blocks()
    train(again, other, range(5, 11))
    assert_same(again, straight)


def test_a_step_without_gradients_counts() -> None:
    model = stack()
    optimizer = build("lisa_adamw", model, update_proj_gap=2)
    turns = [optimizer.active_blocks()]
    for _ in range(6):
        optimizer.step()
        turns.append(optimizer.active_blocks())
    assert turns == [sorted(drawn(0, 2 * (step // 2))) for step in range(7)]


def test_updates_in_the_backward_pass() -> None:
    tokens = torch.arange(8).reshape(2, 4)
    weights = []
    for inside in (False, True):
        model = stack()
        optimizer = build("lisa_adamw", model, lr=0.01, update_proj_gap=2)
        handle = update_in_backward(optimizer) if inside else None
        for _ in range(5):
            model(tokens).square().mean().backward()
            if inside:  # the smallest parameter's waits for the step
                assert sum(p.grad is not None for p in model.parameters()) <= 1
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        weights.append(model)
    for a, b in zip(weights[0].parameters(), weights[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_blocks_of_a_model() -> None:
    blocks, others = blocks_of(stack(3))
    assert list(blocks) == ["layers.0", "layers.1", "layers.2"]
    assert [name for name, _ in blocks["layers.1"]] == [
        *("layers.1.attn.weight", "layers.1.attn.bias", "layers.1.mlp.weight"),
    ]
    assert [name for name, _ in others] == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "head.weight",
    ]
    # Without a list of layers each hidden matrix is one.
    blocks, _ = blocks_of(tiny_model())
    assert list(blocks) == ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    with pytest.raises(ValueError, match="accepted are patterns that match one"):
        blocks_of(stack(), patterns="no such layer")


def test_groups_of_a_model() -> None:
    groups = block_groups(stack(3), weight_decay=0.1, plain_lr=0.5)
    assert [group.get("block") for group in groups] == [0, 0, 1, 1, 2, 2, None, None]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 4
    assert [group.get("lr") for group in groups] == [None, 0.5] * 3 + [0.5] * 2


def test_a_run_too_short_for_all_layers_warns(recwarn: pytest.WarningsRecorder) -> None:
    optimizer = build("lisa_adamw", stack(), update_proj_gap=20)
    optimizer.warn_of_length(41)
    assert not recwarn
    with pytest.warns(UserWarning, match="at most 4 of 5 layers; the others stay"):
        optimizer.warn_of_length(40)


def test_unsorted_parameters_warn_and_are_adamw() -> None:
    first, second = stack(), stack()
    with pytest.warns(UserWarning, match="no parameter group has a block"):
        optimizer = LisaAdamW(first.parameters(), lr=0.01)
    train(first, optimizer, range(3))
    train(second, AdamW(second.parameters(), lr=0.01, weight_decay=0.0), range(3))
    assert_same(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active_layers": 0}, "active_layers=0"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"sampling": "greedy"}, "sampling='greedy'"),
        ({"capturable": True}, "capturable=True"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("lisa_adamw", stack(), **options)
    with pytest.raises(ValueError, match="block=-1"):
        LisaAdamW([{"params": list(stack().parameters()), "block": -1}])
