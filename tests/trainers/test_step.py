"""One step: the gradient, clipping, and what makes a step be skipped."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import comparable_metrics, summary

from lowrank.trainers import loop
from lowrank.trainers.config import ModelConfig, TrainConfig
from lowrank.trainers.data import Batch
from lowrank.trainers.distributed import World
from lowrank.trainers.loss import IGNORED
from lowrank.trainers.models import LanguageModel, build_model
from lowrank.trainers.phases import PhaseMeter
from lowrank.trainers.step import (
    Gradient,
    clip,
    compute_gradient,
    gradient_norm,
    reason_to_skip,
)

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SMALL = ModelConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=31
)


def sequences(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (count, 9), generator=generator)
    targets = tokens[:, 1:].clone()
    # Rows of different lengths, as padding makes them.
    for row in range(count):
        targets[row, 8 - row % 5 :] = IGNORED
    return Batch(tokens[:, :-1], targets)


def split(batch: Batch, parts: int) -> list[Batch]:
    inputs, targets = batch.inputs.chunk(parts), batch.targets.chunk(parts)
    return [Batch(*pair) for pair in zip(inputs, targets, strict=True)]


def gradients(model: LanguageModel) -> list[torch.Tensor]:
    return [item.grad.clone() for item in model.parameters() if item.grad is not None]


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulation_equals_one_large_batch(parts: int) -> None:
    model, batch = build_model(SMALL, 8, 0, CPU), sequences(6)
    whole = compute_gradient(model, [batch], ALONE)
    expected = gradients(model)
    model.zero_grad()
    result = compute_gradient(model, split(batch, parts), ALONE)
    assert result.tokens == whole.tokens == int((batch.targets != IGNORED).sum())
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.norm == pytest.approx(whole.norm, rel=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_batch_of_padding_alone_has_no_gradient() -> None:
    model, batch = build_model(SMALL, 8, 0, CPU), sequences(2)
    empty = Batch(batch.inputs, torch.full_like(batch.targets, IGNORED))
    result = compute_gradient(model, [empty], ALONE)
    assert result == Gradient(0.0, 0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_clipping_are_those_of_single_tensors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.zeros(5, n, dtype=dtype)) for n in (3, 70, 1)]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
    before = [weight.grad.clone() for weight in weights if weight.grad is not None]
    norms = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in before]
    norm = gradient_norm(weights)
    assert torch.equal(norm, torch.linalg.vector_norm(torch.stack(norms)))
    clip(weights, float(norm), 0.5)
    for weight, one in zip(weights, before, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, one * (0.5 / float(norm)))


def test_packed_batches_need_no_count_before_the_backward_pass() -> None:
    model, batch = build_model(SMALL, 8, 0, CPU), sequences(4)
    full = Batch(batch.inputs, batch.targets.clamp(min=0))
    found = compute_gradient(model, split(full, 2), ALONE, packed=True, flag=True)
    assert (found.tokens, found.flags) == (32, 1)
    expected = gradients(model)
    model.zero_grad()
    assert compute_gradient(model, split(full, 2), ALONE) == dataclasses.replace(found, flags=0)
    assert all(map(torch.equal, gradients(model), expected))


def test_clipping_to_a_norm() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    weights.append(torch.nn.Parameter(torch.zeros(4)))  # without a gradient
    weights[0].grad = torch.tensor([2.0, 0.0, 1.0])
    weights[1].grad = torch.tensor([2.0, 4.0])
    norm = float(gradient_norm(weights))
    assert norm == 5.0
    before = copy.deepcopy([weights[0].grad, weights[1].grad])
    clip(weights, norm, 0.0)
    clip(weights, norm, 5.0)
    assert torch.equal(before[0], weights[0].grad)
    clip(weights, norm, 1.0)
    assert float(gradient_norm(weights)) == pytest.approx(1.0)
    assert torch.allclose(before[1] / 5, weights[1].grad)


def test_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16() -> None:
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    weight.grad = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    assert float(gradient_norm([weight])) == pytest.approx(math.sqrt(1000), rel=1e-6)


@pytest.mark.parametrize("shape", [(2048, 1024), (1 << 21,)])
def test_norm_of_bfloat16_gradients_copies_little(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = float(weight.grad.double().norm())
    with PhaseMeter(CPU) as meter, meter.phase("norm"):
        found = gradient_norm([weight])
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert meter.peaks["norm"] < 4 * weight.numel() / 4


@pytest.mark.parametrize(
    ("gradient", "mean", "spike", "reason"),
    [
        (Gradient(math.nan, 1.0, 8), 4.0, 3.0, "nan_loss"),
        (Gradient(math.inf, 1.0, 8), 4.0, 3.0, "nan_loss"),
        (Gradient(4.0, math.nan, 8), 4.0, 3.0, "nan_gradient"),
        (Gradient(4.0, math.inf, 8), None, 3.0, "nan_gradient"),
        (Gradient(7.1, 1.0, 8), 4.0, 3.0, "spike"),
        (Gradient(6.9, 1.0, 8), 4.0, 3.0, None),
        (Gradient(99.0, 1.0, 8), 4.0, 0.0, None),
        (Gradient(99.0, 1.0, 8), None, 3.0, None),
    ],
)
def test_reasons_to_skip(
    gradient: Gradient, mean: float | None, spike: float, reason: str | None
) -> None:
    found = reason_to_skip(gradient, mean, TrainConfig(spike=spike))
    assert (found[0] if found else None) == reason


def disturb(monkeypatch: pytest.MonkeyPatch, steps: set[int], field: str, value: float) -> None:
    """Makes the steps of these numbers go wrong."""
    compute = loop.compute_gradient
    seen: list[Gradient] = []

    def disturbed(
        module: torch.nn.Module, batches: list[Batch], world: World, **options: bool
    ) -> Gradient:
        result = compute(module, batches, world, **options)
        seen.append(result)
        return dataclasses.replace(result, **{field: value}) if len(seen) in steps else result

    monkeypatch.setattr(loop, "compute_gradient", disturbed)


@pytest.mark.parametrize(("field", "reason"), [("loss", "nan_loss"), ("norm", "nan_gradient")])
def test_a_bad_step_is_skipped_counted_and_touches_nothing(
    field: str,
    reason: str,
    tiny: Callable[..., list[str]],
    run: Callable[[list[str]], tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disturb(monkeypatch, {3}, field, math.nan)
    every = ("checkpoint.every=1", "checkpoint.keep=9", "checkpoint.best=false", "eval.every=0")
    status, output, _ = run(tiny(tmp_path / "run", 4, *every))
    assert status == 0
    assert f"step 3 skipped: {reason.replace('_', ' ')}" in output
    records = comparable_metrics(tmp_path / "run")
    skips = [item for item in records if item["kind"] == "skip"]
    assert skips == [{"kind": "skip", "step": 3, "reason": reason, "value": None}]
    steps = [item for item in records if item["kind"] == "train"]
    # The batch is consumed and the schedule goes on.
    assert [item["tokens"] for item in steps] == [128, 256, 384, 512]
    assert len({item["lr"] for item in steps}) == 4
    assert summary(tmp_path / "run")["skipped_steps"] == 1
    folders = [tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (2, 3, 4)]
    names = ("model.safetensors", "optimizer.pt")
    weights = [(folder / names[0]).read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    before, after = (torch.load(item / names[1], weights_only=True) for item in folders[:2])
    assert_same(before["state"], after["state"])


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_too_many_bad_steps_in_a_row_end_the_run(
    tiny: Callable[..., list[str]],
    run: Callable[[list[str]], tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Four in all, but never three in a row before step 8.
    disturb(monkeypatch, {2, 3, 5, 6, 7, 8}, "loss", math.nan)
    folder = tmp_path / "run"
    status, _, errors = run(tiny(folder, 20, "train.max_skips=4"))
    assert status == 1
    assert errors.count("\n") == 1
    assert "4 steps in a row up to step 8 were skipped (nan loss" in errors
    assert "step-0000000" in errors
    assert not (folder / "summary.json").exists()


def test_a_spike_is_skipped_and_leaves_the_mean(
    tiny: Callable[..., list[str]],
    run: Callable[[list[str]], tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disturb(monkeypatch, {5, 25}, "loss", 50.0)
    run(tiny(tmp_path / "run", 26, "eval.every=0", "checkpoint.every=0"))
    records = comparable_metrics(tmp_path / "run")
    skips = [item for item in records if item["kind"] == "skip"]
    # At step 5 there is no mean yet to judge by.
    assert skips == [{"kind": "skip", "step": 25, "reason": "spike", "value": 50.0}]
