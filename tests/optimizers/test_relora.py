"""ReLoRA: its merges against a reference, its draws, pruning, heads, and the re-warm-up."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import matrix, set_gradients, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from lowrank.optimizers import build, expected_state_bytes, merge, state_bytes
from lowrank.optimizers.layers import LowRankLinear
from lowrank.optimizers.methods.relora import prune_, rewarm_steps

OPTIONS: dict[str, Any] = {"update_proj_gap": 3, "reset": "zero"}


def made(seed: int = 0) -> Any:
    model = tiny_model(dtype=torch.float64)
    return model, build("relora_adamw", model, lr=1e-2, rank=4, seed=seed, **OPTIONS)


def adam(param: Tensor, grad: Tensor, state: list[Tensor], step: int, lr: float) -> Tensor:
    """Torch's Adam on plain tensors."""
    state[0] = 0.9 * state[0] + 0.1 * grad
    state[1] = 0.999 * state[1] + 0.001 * grad**2
    corrected = state[0] / (1 - 0.9**step), state[1] / (1 - 0.999**step)
    return param - lr * corrected[0] / (corrected[1].sqrt() + 1e-8)


@pytest.mark.parametrize("official", [True, False])
def test_relora_equals_its_reference(official: bool) -> None:
    """Three merges: moments are zeroed, and the step count goes on or starts anew."""
    linear = nn.ModuleDict({"mlp": nn.Linear(6, 5, dtype=torch.float64)})
    options = {**OPTIONS, "official": official}
    optimizer = build("relora_adamw", linear, lr=1e-2, rank=2, alpha=4.0, **options)
    layer = linear["mlp"]
    frozen, a, b = layer.frozen.clone(), layer.lora_a.detach().clone(), torch.zeros(5, 2).double()
    moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in (a, b)]
    for step in range(1, 10):
        grads = matrix(2, 6, step), matrix(5, 2, 100 + step)
        layer.lora_a.grad, layer.lora_b.grad = (grad.clone() for grad in grads)
        optimizer.step()
        count, lr = step, 1e-2
        if not official and step > 3:
            count = (step - 1) % 3 + 1
            lr = min(1.0, count / 2) * 1e-2  # a rise over one step
        a = adam(a, grads[0], moments[0], count, lr)
        b = adam(b, grads[1], moments[1], count, lr)
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
    first, one = made(seed=5)
    second, two = made(seed=5)
    torch.manual_seed(99)  # draws don't depend on the process's own generator
    for model, optimizer in ((first, one), (second, two)):
        torch.rand(3)
        for step in range(4):
            set_gradients(model, step)
            optimizer.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("how", ["zero", "random", "magnitude", "none"])
def test_pruning(how: str) -> None:
    moments = [matrix(40, 50, 3), matrix(40, 50, 8)]
    before = [moment.clone() for moment in moments]
    prune_(moments, how, 0.9, seed=4)
    kept = moments[0] != 0
    for moment, value in zip(moments, before, strict=True):
        assert torch.equal(moment, value * kept)  # the same entries of both
    share = {"zero": 0.0, "random": 0.1, "magnitude": 0.1, "none": 1.0}[how]
    assert kept.double().mean() == pytest.approx(share, abs=0.03 if how == "random" else 1e-9)
    if how == "magnitude":
        first = before[0].abs()
        assert first[kept].min() >= first[~kept].max()


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
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert state_bytes(optimizer) == formula
    layer = model.self_attn["q_proj"]
    assert layer.lora_a.shape == (8, 16)
    merged = merge(model)
    assert isinstance(merged.self_attn["q_proj"], nn.Linear)
    with pytest.raises(ValueError, match="heads=0"):
        build("relora_adamw", tiny_model(), heads=0)


# The learning rate after a merge


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"update_proj_gap": 5}, 1),
        ({"update_proj_gap": 200}, 20),
        ({"update_proj_gap": 5000}, 100),
        ({"update_proj_gap": 5000, "official": True}, 0),
        ({"update_proj_gap": 5000, "rewarm": 7}, 7),
        ({"update_proj_gap": 5000, "rewarm": 7, "official": True}, 7),
        ({"update_proj_gap": 5000, "rewarm": 0}, 0),
    ],
)
def test_the_rise_follows_from_the_gap(options: dict[str, Any], steps: int) -> None:
    assert rewarm_steps({"rewarm": None, "official": False, **options}) == steps


def steps_taken(rewarm: int, count: int, schedule: Any = None, **options: Any) -> list[float]:
    """The largest change of one factor in each step, under gradients that don't change."""
    model = nn.ModuleDict({"mlp": nn.Linear(6, 5, dtype=torch.float64)})
    options = {"update_proj_gap": 6, "reset": "zero", "rewarm": rewarm, **options}
    optimizer = build("relora_adamw", model, lr=0.1, rank=2, **options)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    layer, changes = model["mlp"], []
    for _ in range(count):
        set_gradients(model, 0)
        merging = len(changes) % 6 == 5
        before = layer.lora_b.detach().clone()
        optimizer.step()
        if scheduler:
            scheduler.step()
        changes.append(0.0 if merging else (layer.lora_b - before).abs().max().item())
    return changes


def test_the_factors_learning_rate_rises_after_each_merge() -> None:
    """Adam's steps under equal gradients are the learning rate itself."""
    rise = [0.025, 0.05, 0.075, 0.1, 0.1, 0.0]
    assert steps_taken(3, 18) == pytest.approx([0.1] * 5 + [0.0] + rise * 2, rel=1e-4)
    assert steps_taken(0, 12) == pytest.approx(([0.1] * 5 + [0.0]) * 2, rel=1e-4)


def test_the_rise_multiplies_a_schedule_and_a_tensor() -> None:
    falling = steps_taken(3, 12, schedule=lambda step: 0.9**step)
    plain = steps_taken(3, 12)
    expected = [0.9**step * change for step, change in enumerate(plain)]
    assert falling == pytest.approx(expected, rel=1e-4)
    model = nn.ModuleDict({"mlp": nn.Linear(6, 5, dtype=torch.float64)})
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = build("relora_adamw", model, lr=rate, rank=2, update_proj_gap=2, rewarm=1)
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    assert float(rate) == pytest.approx(0.1)


def test_other_parameters_keep_their_learning_rate() -> None:
    first, second = tiny_model(), tiny_model()
    makers = [
        build("relora_adamw", m, lr=1e-2, rank=4, rewarm=w, **OPTIONS)
        for m, w in ((first, 0), (second, 2))
    ]
    for step in range(5):
        for model, optimizer in zip((first, second), makers, strict=True):
            set_gradients(model, step)
            optimizer.step()
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.mlp["up_proj"].lora_b, second.mlp["up_proj"].lora_b)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Frozen weights, too: after a merge nothing else tells how the factors were trained."""
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("after", [3, 4, 5, 7])
def test_a_resumed_rise_is_the_same_to_the_bit(after: int) -> None:
    options = {"lr": 1e-2, "rank": 4, "update_proj_gap": 3, "rewarm": 2}
    whole, second = tiny_model(), tiny_model(seed=1)
    optimizer = build("relora_adamw", whole, **options)
    for step in range(after):
        set_gradients(whole, step)
        optimizer.step()
    other = build("relora_adamw", second, **options)
    second.load_state_dict(whole.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(after, 10):
        for model, made_ in ((whole, optimizer), (second, other)):
            set_gradients(model, step)
            made_.step()
    assert_same(whole, second)


def test_a_state_of_an_earlier_version_goes_on_as_it_did() -> None:
    """Without our options in its groups: each moment pruned for itself, and step counts go on."""
    first, second = tiny_model(), tiny_model()
    options = {"lr": 1e-2, "rank": 4, "update_proj_gap": 3, "prune_ratio": 0.5}
    official = build("relora_adamw", first, official=True, **options)
    other = build("relora_adamw", second, **options)
    for step in range(4):
        set_gradients(first, step)
        official.step()
    saved = copy.deepcopy(official.state_dict())
    for group in saved["param_groups"]:
        del group["official"], group["rewarm"]
    for key in saved["state"]:
        if "refreshed_at" in saved["state"][key]:
            saved["state"][key]["refreshed_at"] = 0
    second.load_state_dict(first.state_dict())
    other.load_state_dict(saved)
    for step in range(4, 9):
        for model, made_ in ((first, official), (second, other)):
            set_gradients(model, step)
            made_.step()
    assert_same(first, second)


@pytest.mark.parametrize(("option", "value"), [("rewarm", -1), ("rewarm", 0.5), ("official", "x")])
def test_bad_options_raise(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        build("relora_adamw", tiny_model(), **{"rank": 4, option: value})


def relative_steps(**options: Any) -> float:
    """The largest step of a factor in units of the learning rate, over many merges.

    After each merge B is zero, and with it the first gradient of A, as in training.
    """
    model = nn.ModuleDict({"mlp": nn.Linear(64, 48)})
    options = {"update_proj_gap": 5, "prune_ratio": 0.9, "rewarm": 0, **options}
    optimizer = build("relora_adamw", model, lr=1e-3, rank=16, **options)
    layer, worst = model["mlp"], 0.0
    for step in range(60):
        set_gradients(model, step)
        layer.lora_a.grad.mul_(float(layer.lora_b.detach().any()))
        before = layer.lora_a.detach().clone()
        optimizer.step()
        if step % 5 != 4:
            worst = max(worst, (layer.lora_a - before).abs().max().item() / 1e-3)
    return worst


@pytest.mark.parametrize("reset", ["random", "magnitude", "zero", "none"])
def test_steps_after_a_merge_are_bounded(reset: str) -> None:
    """A first moment without its second makes a step of M / eps where there is no gradient."""
    assert relative_steps(reset=reset) < 3.2
    if reset in ("random", "magnitude"):
        assert relative_steps(reset=reset, official=True) > 1e3


@pytest.mark.slow
@pytest.mark.parametrize("gap", [5, 20])
@pytest.mark.parametrize("lr", [3e-3, 1e-2])
def test_a_plain_loop_trains(gap: int, lr: float) -> None:
    """No schedule, no clipping: a small model learns to continue a periodic text."""
    torch.manual_seed(0)
    text = torch.randint(0, 32, (40,)).repeat(50)
    model = tiny_model()
    optimizer = build("relora_adamw", model, lr=lr, rank=16, update_proj_gap=gap)
    losses = []
    for step in range(400):
        x = text[step : step + 65].view(1, -1)
        loss = functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
