"""Runs that go on with another length, and settings that may not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_pretrain import crash
from tiny_runs import comparable_metrics, summary

from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.pretrain import resolve
from lowrank.trainers.resume import check_unchanged, resumed_config

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]


def rates(folder: Path) -> list[Any]:
    return [item["lr"] for item in comparable_metrics(folder) if item["kind"] == "train"]


@pytest.mark.parametrize("name", ["constant", "wsd"])
def test_a_run_can_be_made_longer(name: str, tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = (f"schedule.name={name}", "schedule.warmup_ratio=0.2", "eval.every=5")
    crash(run, tiny(folder, 10, *settings), 7)
    status, _, errors = run(["pretrain", f"--resume={folder}", "--steps=20", "--device=cpu"])
    assert (status, errors) == (0, "")
    assert summary(folder)["steps"] == 20
    # As a run that had been meant to be that long from the start, with as many steps of warmup.
    run(tiny(whole, 20, *settings, "schedule.warmup_ratio=0.1"))
    assert comparable_metrics(folder) == comparable_metrics(whole)
    assert summary(folder)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["schedule"]["warmup_ratio"] == 0.1


def test_a_finished_constant_run_goes_on_and_may_be_killed_again(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 6, "schedule.name=constant"))
    first = summary(folder)
    crash(run, ["pretrain", f"--resume={folder}", "--steps=12", "--device=cpu"], 7)
    assert not (folder / "summary.json").exists()
    status, _, errors = run(["pretrain", f"--resume={folder}", "--device=cpu"])
    assert (status, errors) == (0, "")
    assert summary(folder)["steps"] == 12
    assert summary(folder)["initial_val_loss"] == first["initial_val_loss"]
    assert len(rates(folder)) == 12


def test_a_run_made_shorter_is_evaluated_where_it_ends(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    crash(run, tiny(folder, 20, "schedule.name=constant", "schedule.warmup_ratio=0"), 7)
    status, _, errors = run(["pretrain", f"--resume={folder}", "--steps=6", "--device=cpu"])
    assert (status, errors) == (0, "")
    evals = [item for item in comparable_metrics(folder) if item["kind"] == "eval"]
    assert evals[-1]["step"] == 6
    assert summary(folder)["val_loss"] == evals[-1]["val_loss"]


@pytest.mark.parametrize(
    ("name", "steps", "reason"),
    [
        ("cosine", 20, "under the cosine schedule step 4 would have had "),
        ("linear", 20, "under the linear schedule step 4 would have had "),
        ("wsd", 20, "checkpoints up to step 5 can go on so"),
        ("constant", 5, "train.steps is 5, but the run to resume has 10, and 9 steps are done"),
    ],
)
def test_a_length_that_the_schedule_does_not_allow_says_why_and_what_to_do(
    name: str, steps: int, reason: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = (f"schedule.name={name}", "schedule.decay_ratio=0.6", "schedule.warmup_ratio=0.2")
    crash(run, tiny(folder, 10, *settings), 9)
    before = [(folder / file).read_bytes() for file in ("metrics.jsonl", "config.yaml")]
    status, _, errors = run(["pretrain", f"--resume={folder}", f"--steps={steps}", "--device=cpu"])
    assert status == 2
    assert errors.count("\n") == 1
    assert errors.startswith(f"lowrank: train.steps is {steps}, but the run to resume has 10")
    assert reason in errors
    assert f"--set model.initial={folder}/checkpoints/step-00000009" in errors
    assert [(folder / file).read_bytes() for file in ("metrics.jsonl", "config.yaml")] == before


def test_a_method_with_a_schedule_of_its_own_cannot_be_made_longer(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    crash(run, tiny(folder, 10, "schedule.name=constant", optimizer="switchlora_adamw"), 7)
    status, _, errors = run(["pretrain", f"--resume={folder}", "--steps=20", "--device=cpu"])
    assert status == 2
    assert "switchlora_adamw lays its own schedule out over the steps" in errors


def test_all_that_differs_is_named_and_the_advice_works(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder, new = tmp_path / "run", tmp_path / "new"
    crash(run, tiny(folder, 10), 6)
    changes = ("optimizer.lr=0.5", "optimizer.rank=4", "train.clip=2", "data.packing=pad")
    status, _, errors = run(tiny(folder, 10, "--resume=auto", *changes))
    assert status == 2
    assert errors.count("\n") == 1
    for part in ("data.packing is 'pad'", "optimizer.lr (0.5, not", "optimizer.rank (4, not 8)"):
        assert part in errors
    assert ", and 1 more; leave them as they were, or start a new run" in errors
    (initial,) = [word for word in errors.split() if word.startswith("model.initial=")]
    assert run(tiny(new, 2, *changes, initial))[0] == 0
    evals = [item["val_loss"] for item in comparable_metrics(folder) if item["kind"] == "eval"]
    assert summary(new)["initial_val_loss"] != evals[0]
    status, _, errors = run(tiny(folder, 10, "--resume=auto", "model.hidden_size=64"))
    assert status == 2
    assert "model.initial" not in errors


def test_another_optimizer_is_refused_before_it_is_built(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    crash(run, tiny(folder, 10, "optimizer.proj_type=std"), 4)
    status, _, errors = run(
        ["pretrain", f"--resume={folder}", "--optimizer=sltrain_adamw", "--device=cpu"]
    )
    assert status == 2
    assert errors.startswith("lowrank: optimizer.name is 'sltrain_adamw', but the run to resume")


def test_restarts_follow_the_methods_cycle() -> None:
    relora = {"optimizer": {"name": "relora_adamw"}}
    preset = resolve(relora)
    assert preset.schedule.cycle == preset.optimizer.options["update_proj_gap"] == 150
    assert preset.schedule.restart_warmup == 10
    shorter = resolve({"optimizer": {"name": "relora_adamw", "update_proj_gap": 40}})
    assert (shorter.schedule.cycle, shorter.schedule.restart_warmup) == (40, 4)
    own = resolve({**relora, "schedule": {"cycle": 30, "restart_warmup": 7}})
    assert (own.schedule.cycle, own.schedule.restart_warmup) == (30, 7)
    with pytest.raises(ValueError, match=r"restart_warmup is 50; accepted: .*cycle \(40\)"):
        resolve(
            {
                "optimizer": {"name": "relora_adamw", "update_proj_gap": 40},
                "schedule": {"restart_warmup": 50},
            }
        )
    with pytest.raises(ValueError, match=r"schedule\.cycle is 0; .* optimizer\.update_proj_gap"):
        resolve({"optimizer": {"name": "adamw"}, "schedule": {"name": "cosine_restarts"}})


def test_checkpoints_with_the_layers_under_their_former_name_are_read(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    from lowrank.trainers import parts

    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(tiny(whole, 8, optimizer="relora_adamw"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LAYERS", "quantized.safetensors")
        crash(run, tiny(folder, 8, optimizer="relora_adamw"), 6)
    saved = folder / "checkpoints" / "step-00000006"
    assert (saved / "quantized.safetensors").is_file()
    assert not (saved / "layers.safetensors").exists()
    assert run(tiny(folder, 8, "--resume=auto", optimizer="relora_adamw"))[0] == 0
    assert (folder / "checkpoints" / "step-00000008" / "layers.safetensors").is_file()
    assert comparable_metrics(folder) == comparable_metrics(whole)
    assert summary(folder)["weights_sha256"] == summary(whole)["weights_sha256"]


@pytest.mark.parametrize(
    ("schedule", "also"), [("constant", False), ("cosine", True)], ids=["allowed", "not allowed"]
)
def test_a_length_that_may_change_is_not_named_beside_what_may_not(
    schedule: str, also: bool
) -> None:
    content: dict[str, Any] = {
        "optimizer": {"rank": 4},
        "train": {"steps": 10},
        "schedule": {"name": schedule},
    }
    now = {**content, "optimizer": {"rank": 8}, "train": {"steps": 20}}
    with pytest.raises(ValueError, match=r"optimizer\.rank is 8, but the run to resume") as raised:
        check_unchanged(from_mapping(content), resumed_config(content, now), Path("checkpoint"), 5)
    assert ("train.steps" in str(raised.value)) is also


def test_another_strategy_needs_no_stage_of_zero() -> None:
    content: dict[str, Any] = {"distributed": {"strategy": "deepspeed", "zero_stage": 2}}
    for strategy in ("ddp", "fsdp2", "auto"):
        now = resumed_config(content, {"distributed": {"strategy": strategy}})
        assert (now.distributed.strategy, now.distributed.zero_stage) == (strategy, 1)
    for kept in ({}, {"distributed": {"strategy": "deepspeed"}}):
        assert resumed_config(content, kept).distributed.zero_stage == 2
    with pytest.raises(ValueError, match=r"distributed\.zero_stage is 3"):
        resumed_config(content, {"distributed": {"strategy": "ddp", "zero_stage": 3}})
