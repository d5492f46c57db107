"""Runs of methods with factored layers: exact resume, dense export, warm start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import crash
from tiny_runs import comparable_metrics, summary

from lowrank.optimizers import convert
from lowrank.optimizers.registry import accepts
from lowrank.trainers.parts import LAYERS, load_network
from lowrank.trainers.report import write_report

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]

#: Each method with settings under which it does something every few steps of a tiny run.
METHODS = {
    "sltrain_adamw": ("optimizer.density=0.05", "optimizer.refactor_gap=4"),
    "sltrain_adamw_8bit": ("optimizer.support=stored", "optimizer.min_8bit_size=0"),
    "sst_adamw": ("optimizer.update_proj_gap=2",),
    "low_rank_adamw": ("optimizer.refactor_gap=4",),
    "loqt_adamw": ("optimizer.update_proj_gap=4",),
    "relora_adamw": ("optimizer.update_proj_gap=4",),
    "switchlora_adamw": ("optimizer.switch_interval=10", "optimizer.descent_rate=5"),
}
#: Options of conversions, which whoever loads a converted checkpoint has to know.
OWN: dict[str, dict[str, Any]] = {
    "sltrain_adamw": {"alpha": 16.0, "density": 0.05},
    "sltrain_adamw_8bit": {"alpha": 16.0, "support": "stored", "density": 0.03},
    "loqt_adamw": {},
    "sst_adamw": {},
    "switchlora_adamw": {},
}


def slowly(*quick: str, more: tuple[str, ...] = ()) -> list[Any]:
    """Slow parameters for the methods but these."""
    return [
        pytest.param(name, *more, marks=pytest.mark.slow) for name in METHODS if name not in quick
    ]


methods = pytest.mark.parametrize("name", METHODS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("relora_adamw", "float32"),
        ("sltrain_adamw", "bfloat16"),
        ("switchlora_adamw", "float32"),
        *slowly("relora_adamw", "switchlora_adamw", more=("float32",)),
    ],
)
def test_a_run_resumes_exactly_within_a_cycle(
    name: str, dtype: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = (f"model.dtype={dtype}", *METHODS[name])
    run(tiny(whole, 10, *settings, optimizer=name))
    arguments = tiny(broken, 10, "--resume=auto", *settings, optimizer=name)
    crash(run, arguments, 5)
    crash(run, arguments, 7)
    status, _, errors = run(arguments)
    idle = {f"warning: {name}: update_proj_gap=3 has no effect on this method"}
    assert status == 0
    assert {*errors.splitlines()} == (set() if accepts(name, "update_proj_gap") else idle)
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(whole)["weights_sha256"] == summary(broken)["weights_sha256"]


@methods
def test_a_checkpoint_is_a_plain_model_with_the_same_logits(
    name: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    own = OWN.get(name, {"alpha": 16.0})
    settings = [f"optimizer.{key}={value}" for key, value in own.items()]
    run(tiny(tmp_path / "run", 5, *METHODS[name], *settings, optimizer=name))
    saved = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert (saved / LAYERS).is_file()
    dense = AutoModelForCausalLM.from_pretrained(saved)
    converted = convert(name, AutoModelForCausalLM.from_config(dense.config), rank=8, **own)
    load_network(converted, saved)
    tokens = torch.randint(257, (2, 16))
    expected = converted(tokens).logits
    torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0


@pytest.mark.parametrize("name", ["relora_adamw", *slowly("relora_adamw")])
def test_events_are_in_the_metrics_and_the_report(
    name: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    run(tiny(tmp_path / "run", 8, *METHODS[name], optimizer=name))
    found = [item for item in comparable_metrics(tmp_path / "run") if item["kind"] == "event"]
    if name == "sltrain_adamw_8bit":  # schedules nothing
        assert not found
        return
    kinds = {
        "loqt_adamw": "requantize",
        "relora_adamw": "merge",
        "switchlora_adamw": "switch",
        "sst_adamw": "resample",
    }
    kind = kinds.get(name, "refactor")
    assert kind in {item["name"] for item in found}
    assert all(int(str(item["layers"])) >= 1 for item in found)
    if name == "relora_adamw":
        assert [item["step"] for item in found] == [4, 8]
    assert kind in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_warm_start_from_a_full_rank_run(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    run(tiny(tmp_path / "full", 6, "optimizer.lr=0.01", optimizer="adamw"))
    saved = tmp_path / "full" / "checkpoints" / "step-00000006"
    settings = (f"model.initial={saved}", "optimizer.update_proj_gap=4")
    run(tiny(tmp_path / "warm", 6, *settings, optimizer="relora_adamw"))
    first, full = (summary(tmp_path / name) for name in ("warm", "full"))
    assert first["initial_val_loss"] == pytest.approx(full["val_loss"], rel=1e-5)
    status, _, errors = run(
        tiny(tmp_path / "bad", 2, f"model.initial={tmp_path}", optimizer="relora_adamw")
    )
    assert status != 0
    assert "model.initial=" in errors
    status, _, errors = run(
        tiny(tmp_path / "other", 2, *settings, "model.hidden_size=64", optimizer="relora_adamw")
    )
    assert status != 0
    assert "is of another shape" in errors
