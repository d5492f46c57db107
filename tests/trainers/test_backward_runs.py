"""Runs whose updates are made in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import crash, kinds
from tiny_runs import comparable_metrics, summary

from lowrank.trainers import in_backward, loop, strategies
from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.step import Gradient

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]
ON = "train.update_in_backward=true"
QUIET = ("eval.every=0", "checkpoint.every=0")


def test_the_same_weights_to_the_bit(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    once = ("train.accumulation=1", "train.clip=0", *QUIET)
    run(tiny(tmp_path / "off", 5, *once))
    status, output, errors = run(tiny(tmp_path / "on", 5, *once, ON))
    assert (status, errors) == (0, "")
    assert "updates in the backward pass (1 of 12 gradients kept whole)" in output
    found = [summary(tmp_path / name) for name in ("off", "on")]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    own, other = (comparable_metrics(tmp_path / name) for name in ("on", "off"))
    assert [item["kind"] for item in own] == [item["kind"] for item in other]  # refreshes too
    for one, two in zip(
        kinds(tmp_path / "on", "train"), kinds(tmp_path / "off", "train"), strict=True
    ):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "exact"),
    [
        (("train.clip=0",), False),
        (("train.clip=0.1",), True),
        (("train.clip=0.1", "train.clip_norm=projected"), False),
        (("train.clip=0.1", "train.clip_norm=previous"), False),
    ],
)
def test_accumulation_and_clipping(
    more: tuple[str, ...], exact: bool, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    """The norm is the whole gradient's, or of projections between refits."""
    off = [item for item in more if "clip_norm" not in item]
    run(tiny(tmp_path / "off", 5, *off, *QUIET))
    status, output, errors = run(tiny(tmp_path / "on", 5, *more, ON, *QUIET))
    assert (status, errors) == (0, "")
    assert f"({12 if exact else 5} of 12 gradients kept whole)" in output
    pairs = zip(kinds(tmp_path / "on", "train"), kinds(tmp_path / "off", "train"), strict=True)
    for step, (own, other) in enumerate(pairs):
        same = exact or step % 3 == 0  # steps with a refit
        if "clip_norm" not in "".join(more) or step == 0:
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
            rel = 1e-4 if same else 0.2
            assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=rel)


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("galore_adamw", ("train.clip=0.1", "train.clip_norm=previous")),
        ("qgalore_adamw_8bit", ()),
        ("relora_adamw", ("train.clip=0.1", "train.accumulation=1")),
    ],
)
def test_resuming(
    optimizer: str, more: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(tiny(whole, 7, ON, *more, optimizer=optimizer))[0] == 0
    crash(run, tiny(broken, 7, ON, *more, optimizer=optimizer), 5)
    assert run(tiny(broken, 7, "--resume=auto", ON, *more, optimizer=optimizer))[0] == 0
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["weights_sha256"] == summary(whole)["weights_sha256"]


def test_it_may_be_turned_on_in_a_resumed_run(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    crash(run, tiny(tmp_path / "run", 6, "train.accumulation=1"), 4)
    status, output, _ = run(tiny(tmp_path / "run", 6, "--resume=auto", "train.accumulation=1", ON))
    assert status == 0
    assert "updates in the backward pass" in output


def disturb(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Gives the losses of these steps another value, where the loop judges them."""
    judge, seen = loop.reason_to_skip, []

    def judged(gradient: Gradient, mean: float | None, config: Any) -> Any:
        seen.append(gradient)
        bad = len({id(own) for own in seen}) in steps
        if bad:
            gradient = Gradient(value, gradient.norm, gradient.tokens, gradient.flags)
        return judge(gradient, mean, config)

    monkeypatch.setattr(loop, "reason_to_skip", judged)


@pytest.mark.parametrize("clip", ["train.clip=0", "train.clip=1.0"])
def test_a_bad_loss_is_skipped_and_touches_nothing(
    clip: str, tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run without: nothing is updated before the last backward pass."""
    # With clipping a step is judged twice, by its loss and by its norm.
    disturb(monkeypatch, {3 if clip.endswith("=0") else 5}, math.nan)
    every = ("checkpoint.every=1", "checkpoint.keep=9", "checkpoint.best=false", "eval.every=0")
    status, output, _ = run(tiny(tmp_path / "run", 4, *every, ON, clip))
    assert status == 0
    assert "step 3 skipped: nan loss" in output
    folders = [tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (2, 3, 4)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    states = [torch.load(item / "optimizer.pt", weights_only=True) for item in folders]
    assert str(states[0]["state"]) == str(states[1]["state"]) != str(states[2]["state"])


def test_a_gradient_that_is_not_finite_is_a_skipped_step_with_clipping(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = in_backward.begin

    def spoiled(optimizer: Any, config: Any, passes: int) -> Any:
        param, calls = optimizer.param_groups[0]["params"][0], []

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return grad * math.nan if len(calls) == 4 else grad

        param.register_hook(spoil)
        return begin(optimizer, config, passes)

    monkeypatch.setattr(strategies, "begin", spoiled)
    once = ("train.accumulation=1", "train.clip=1.0", *QUIET)
    status, output, errors = run(tiny(tmp_path / "run", 6, ON, *once))
    assert status == 0
    assert "non-finite gradient of" in errors
    assert "step 4 skipped: nan gradient" in output
    assert summary(tmp_path / "run")["skipped_steps"] == 1


def test_one_process_may_take_the_parts_of_several(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    """So that it has more backward passes than `train.accumulation`."""
    shards = ("distributed.data_shards=2", "train.accumulation=1", "train.clip=0", *QUIET)
    for name, more in (("off", ()), ("on", (ON,))):
        status, _, errors = run(tiny(tmp_path / name, 3, *shards, *more))
        assert (status, errors) == (0, "")
    pairs = zip(kinds(tmp_path / "on", "train"), kinds(tmp_path / "off", "train"), strict=True)
    for own, other in pairs:
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "deepspeed"])
def test_processes_that_average_later(strategy: str) -> None:
    config = from_mapping(
        {"train": {"update_in_backward": True}, "distributed": {"strategy": strategy}}
    )
    assert strategies.strategy_of(config, 1) == "alone"
    said = r"train.update_in_backward is True with .* on 2 processes.*accepted: false, or dist"
    with pytest.raises(ValueError, match=said):
        strategies.strategy_of(config, 2)


@pytest.mark.parametrize(
    "train",
    [
        {"clip_norm": "projected", "clip": 1.0},
        {"clip_norm": "previous", "update_in_backward": True},
        {"clip_norm": "whole", "clip": 1.0, "update_in_backward": True},
    ],
)
def test_norms_that_do_nothing(train: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train.clip_norm is '\w+'; accepted: exact"):
        from_mapping({"train": train})


def test_bases_of_the_first_micro_batch(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    more = ("train.clip=0", "train.refit=first", "checkpoint.every=2", "eval.every=0", ON)
    status, output, errors = run(tiny(tmp_path / "whole", 6, *more))
    assert (status, errors) == (0, "")
    assert "(5 of 12 gradients kept whole)" in output
    crash(run, tiny(tmp_path / "run", 6, *more), 4)
    status, output, _ = run(tiny(tmp_path / "run", 6, "--resume=auto", *more))
    assert (status, "resuming at step" in output) == (0, True)
    assert comparable_metrics(tmp_path / "run") == comparable_metrics(tmp_path / "whole")
    run(tiny(tmp_path / "other", 6, *(item for item in more if "refit" not in item)))
    weights = {summary(tmp_path / name)["weights_sha256"] for name in ("run", "whole", "other")}
    assert len(weights) == 2


@pytest.mark.parametrize(
    "train",
    [
        {"refit": "last", "update_in_backward": True},
        {"refit": "first"},
        {"refit": "first", "update_in_backward": True, "clip": 1.0, "accumulation": 2},
    ],
)
def test_refits_that_do_nothing(train: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train.refit is '\w+'; accepted: whole, or with"):
        from_mapping({"train": train})
