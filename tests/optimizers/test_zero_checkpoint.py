"""What `load_zero_checkpoint` restores beside the optimizer's parameters, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import block, run
from test_zero import engine_of, go_on
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lowrank.optimizers import AdamW, build, load_zero_checkpoint

pytest.importorskip("deepspeed")
PRELOAD = ("deepspeed",)
pytestmark = pytest.mark.slow

WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 9}
SCHEDULED = {"scheduler": {"type": "WarmupLR", "params": {**WARMUP, "warmup_type": "linear"}}}


def headless(stage: int, seed: int, **options: Any) -> tuple[nn.Module, Any]:
    """A model whose head requires gradients but is in no optimizer, and its engine."""
    model = block(seed)
    trained = [param for name, param in model.named_parameters() if not name.startswith("head")]
    return model, engine_of(model, AdamW(trained, lr=0.01), stage, 1, **options)


def told(engine: Any, folder: Path, tag: str) -> str:
    """What a refusal says; it has changed nothing."""
    before = [param.detach().clone() for param in engine.module.parameters()]
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    with pytest.raises(ValueError, match=r".") as raised:
        load_zero_checkpoint(engine, folder, tag)
    now = list(engine.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert rates == [group["lr"] for group in engine.optimizer.param_groups]
    assert engine.global_steps == 0
    return str(raised.value)


def cases(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Saves, and goes on in other ways."""
    warnings.simplefilter("ignore")
    made: dict[str, Any] = {}
    expected = {}
    for stage, options in ((1, {}), (2, SCHEDULED), (3, {})):
        model, engine = headless(stage, 0, **options)
        go_on(engine, range(2), rank, world)
        engine.save_checkpoint(str(folder), str(stage))
        expected[stage] = model

    model, engine = headless(2, 1)
    assert not torch.equal(model.head.weight, expected[1].head.weight)
    load_zero_checkpoint(engine, folder, "1")
    made["head"] = torch.equal(model.head.weight, expected[1].head.weight)

    made["stage 3"] = told(headless(1, 1)[1], folder, "3")
    made["no scheduler"] = told(headless(1, 1)[1], folder, "2")
    made["new scheduler"] = told(headless(1, 1, **SCHEDULED)[1], folder, "1")
    other = headless(1, 1)[1]
    other.lr_scheduler = LambdaLR(other.optimizer.optimizer, lambda step: 1.0)
    made["other scheduler"] = told(other, folder, "2")

    _, engine = headless(1, 1)
    load_zero_checkpoint(engine, folder, "2", load_lr_scheduler_states=False)
    made["left"] = engine.global_steps
    _, engine = headless(1, 1, **SCHEDULED)
    load_zero_checkpoint(engine, folder, "2")
    made["taken"] = engine.lr_scheduler.last_batch_iteration

    made["stage 0"] = told(headless(0, 1)[1], folder, "1")

    path = folder / "1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    made["half"] = told(headless(1, 1)[1], folder, "1")

    for stage in (1, 3):
        model = block()
        optimizer = build("adamw", model, lr=0.01)
        model.head.weight.requires_grad_(False)
        engine = engine_of(model, optimizer, stage, world)
        with pytest.raises(ValueError, match=r"^head\.weight is in the optimizer, but in no"):
            go_on(engine, range(1), rank, world)
    return made


def test_what_is_not_restored_is_told(tmp_path: Path) -> None:
    (made,) = run(cases, 1, tmp_path)
    assert made["head"]
    assert "head.weight, which requires a gradient but is not in the optimizer" in made["stage 3"]
    assert (
        "the checkpoint has a learning rate scheduler and the engine has none"
        in (made["no scheduler"])
    )
    assert (
        "the engine has a learning rate scheduler and the checkpoint has none"
        in (made["new scheduler"])
    )
    assert "is not of LambdaLR, the engine's" in made["other scheduler"]
    assert made["left"] == 2
    assert made["taken"] == 1
    assert made["stage 0"].startswith("the engine has ZeRO stage 0: accepted are 1, 2 and 3")
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt can't be read" in made["half"]
