"""Checkpoints of version 0.1.0 still load, and training goes on from them as it did then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint_fixture import (
    AFTER,
    CASES,
    FOLDER,
    GRADIENTS,
    optimizer_for,
    outputs,
    small_model,
    take_step,
)
from torch import Tensor

from lowrank.optimizers import Int8Weight, available

FILES = sorted(path for path in FOLDER.glob("*.pt") if path != GRADIENTS)
#: Mean difference that flipped roundings may leave, a hundredth of what a step changes; beside it
#: three entries of a small tensor may be off by their whole unit.
FLIPPED = 1e-4


@pytest.fixture(scope="module")
def gradients() -> list[dict[str, Tensor]]:
    return torch.load(GRADIENTS, weights_only=True)


def load(path: Path) -> tuple[dict[str, Any], Any, Any]:
    """The file, and a model and an optimizer that it was loaded into."""
    saved = torch.load(path, weights_only=True)
    metadata = saved["metadata"]
    if kept_half_precision_moments(saved):
        metadata["options"]["moments_dtype"] = "bfloat16"
    model = small_model(metadata)
    optimizer = optimizer_for(metadata, model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved, model, optimizer


def kept_half_precision_moments(saved: dict[str, Any]) -> bool:
    """Whether moments are bf16, which version 0.1.0 knew no other way under bf16 weights."""
    states = saved["optimizer"]["state"].values()
    moments = [state[key].dtype for state in states for key in state if key.startswith("exp_avg")]
    return torch.bfloat16 in moments


def test_half_precision_moments_are_cast_unless_they_are_asked_for() -> None:
    path = FOLDER / "galore_adamw-bf16.pt"
    saved = torch.load(path, weights_only=True)
    assert kept_half_precision_moments(saved)
    optimizer = optimizer_for(saved["metadata"], small_model(saved["metadata"]))
    optimizer.load_state_dict(saved["optimizer"])
    loaded = optimizer.state_dict()["state"]
    for key, state in saved["optimizer"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert loaded[key][name].dtype == torch.float32
            assert torch.equal(loaded[key][name], state[name].float())
    assert all(
        kept_half_precision_moments({"optimizer": {"state": {0: s}}})
        for s in saved["optimizer"]["state"].values()
    )


def dense(value: Tensor) -> Tensor:
    return (value.dequantize() if isinstance(value, Int8Weight) else value).detach().double()


def difference(now: Tensor, then: Tensor) -> Tensor:
    """Entries' differences, in units of the largest weight."""
    assert now.shape == then.shape
    size = dense(then).abs().max().clamp(min=1e-30)
    return (dense(now) - dense(then)).abs() / size


def slack(metadata: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """How far entries may lie apart, in units of the largest weight: at most, and in the mean.

    Where something is rounded coarsely, a last bit may flip a rounding: few entries, by a unit.
    """
    if metadata["kind"] == "rounded":
        # A unit of bf16, or a step of a group's INT8 range, up or down in each step.
        return metadata["steps"] / 128, metadata["steps"] / 400
    if dtype in (torch.bfloat16, torch.uint8):
        # A flipped 8-bit code flips the roundings of all that lies near a tie.
        return 2.0**-7, 1e-3 if "8bit" in metadata["name"] else FLIPPED
    if "8bit" in metadata["name"]:
        return 2e-3, FLIPPED
    # The SVD of a product of factors magnifies last bits by its condition, that of LoQT's gradient
    # less; which bits these are depends on the processor.
    most = 1e-5 if metadata["options"].get("refactor_gap") else 1e-6
    most = 4e-6 if metadata["name"].startswith("loqt") else most
    return most, most


def assert_continued(now: dict[str, Tensor], saved: dict[str, Any]) -> None:
    then = saved["later"]
    assert now.keys() >= then.keys()  # later versions may save more
    for name, value in then.items():
        off = difference(now[name], value)
        assert bool(off.isfinite().all())
        most, mean = slack(saved["metadata"], value.dtype)
        assert float(off.max()) <= most, f"{name} is off by {float(off.max()):.1e}"
        mean += 3 * most / off.numel()
        assert float(off.mean()) <= mean, f"{name} is off by {float(off.mean()):.1e} in the mean"


def test_every_method_has_a_file() -> None:
    made = {torch.load(path, weights_only=True)["metadata"]["name"] for path in FILES}
    assert {path.name for path in FILES} == {case.file for case in CASES}
    # A method that came later has none.
    assert made <= set(available())
    assert len(made) == 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_saved_is_what_is_loaded(path: Path, gradients: list[dict[str, Tensor]]) -> None:
    saved, model, optimizer = load(path)
    loaded = optimizer.state_dict()
    assert loaded["state"].keys() == saved["optimizer"]["state"].keys()
    for key, state in saved["optimizer"]["state"].items():
        for name, value in state.items():
            now = loaded["state"][key][name]
            if isinstance(value, Tensor):
                assert now.dtype == value.dtype
                assert torch.equal(now, value), name
            else:
                assert now == value, name
    for now, then in zip(loaded["param_groups"], saved["optimizer"]["param_groups"], strict=True):
        assert {key: now.get(key, key) for key in then} == then
    now, then = model.state_dict(), saved["model"]
    assert now.keys() >= then.keys()  # later versions may save more
    assert all(torch.equal(now[name], then[name]) for name in then)
    # Not only the tensors: what the layers compute from them, such as a seeded sparse support.
    for layer, y in outputs(model, gradients[0]).items():
        torch.testing.assert_close(y, saved["outputs"][layer])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_training_goes_on_as_it_did(path: Path, gradients: list[dict[str, Tensor]]) -> None:
    saved, model, optimizer = load(path)
    steps = saved["metadata"]["steps"]
    counts = [int(state["step"]) for state in optimizer.state.values()]
    for step in gradients[:steps]:
        take_step(model, optimizer, step)
    if steps:
        assert_continued(model.state_dict(), saved)
    before = [dense(param) for param in model.parameters()]
    for step in gradients[steps:]:
        take_step(model, optimizer, step)
    after = [dense(param) for param in model.parameters()]
    assert all(bool(value.isfinite().all()) for value in after)
    if steps < AFTER:
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [int(state["step"]) for state in optimizer.state.values()] == [c + AFTER for c in counts]
