"""DeepSpeed's ZeRO: `deepspeed.initialize(model, optimizer=build(...))` follows one process."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp2_runs import ALL, QUICK, Case, limit, options_of
from sharded import block, distance, run, tokens, train
from torch import Tensor, nn
from torch.nn import functional

from lowrank.optimizers import LowRankOptimizer, build

pytest.importorskip("deepspeed")
PRELOAD = ("deepspeed",)


def quiet_deepspeed(world: int) -> Any:
    """DeepSpeed on the CPU, in a process of those that `run` started."""
    os.environ.update(DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(world), LOCAL_RANK="0")
    os.environ.setdefault("MASTER_PORT", "29511")
    warnings.simplefilter("ignore")
    import deepspeed

    # Its reductions in shared memory wait actively, which processes on few cores can't afford.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def engine_of(
    model: nn.Module, optimizer: LowRankOptimizer, stage: int, world: int, **options: Any
) -> Any:
    deepspeed = quiet_deepspeed(world)
    zero = {"stage": stage, **options.pop("zero", {})}
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 12 // world,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def go_on(engine: Any, steps: range, rank: int, world: int) -> None:
    for step in steps:
        for part in range(2):
            rows = tokens(step, part)
            own = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
            logits = engine(own[:, :-1]).float()
            loss = functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
            engine.backward(loss)
            engine.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered where stage 3 has cut them."""
    from deepspeed import zero

    made = {}
    for name, param in model.named_parameters():
        cut = [param] if hasattr(param, "ds_id") else []
        with zero.GatheredParameters(cut, enabled=bool(cut)):
            made[name] = param.detach().float().clone()
    return made


def follow(
    rank: int, world: int, folder: Path, cases: list[tuple[Case, int]], steps: int
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Weights of each case at its stage, and of one process alone."""
    made = []
    for (name, options), stage in cases:
        model = block()
        keywords = options_of((name, options))
        engine = engine_of(model, build(name, model, **keywords), stage, world)
        go_on(engine, range(steps), rank, world)
        together, alone = whole(model), {}
        if rank == 0:
            model = block()
            train(model, build(name, model, **keywords), range(steps))
            alone = {name: param.detach() for name, param in model.named_parameters()}
        made.append((together, alone))
    return made


def too_far(made: list[Any], cases: list[tuple[Case, int]]) -> dict[str, float]:
    found = {}
    for ((name, options), stage), (together, alone) in zip(cases, made, strict=True):
        called = f"{name} {options} stage {stage}"
        gap = distance(together, alone)
        if not gap <= limit(called):
            found[called] = gap
    return found


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(QUICK, marks=pytest.mark.slow, id="some"),
        pytest.param(ALL, marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_two_ranks_follow_one_process(tmp_path: Path, chosen: list[Case]) -> None:
    """Each method at one of the stages."""
    cases = [(case, 1 + number % 3) for number, case in enumerate(chosen)]
    assert not too_far(run(follow, 2, tmp_path, cases, 10)[0], cases)


@pytest.mark.slow
def test_pieces_that_end_within_rows(tmp_path: Path) -> None:
    """Some of three processes have nothing of some parameters."""
    cases = [(case, stage) for case in QUICK[4:6] for stage in (1, 3)]
    assert not too_far(run(follow, 3, tmp_path, cases, 10)[0], cases)


def resumed(
    rank: int, world: int, folder: Path, stage: int, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after eight steps, and after four, saving, loading into a new engine, and four."""
    made = []
    for parts in ([range(8)], [range(4), range(4, 8)]):
        for number, steps in enumerate(parts):
            model = block()
            optimizer = build("galore_adamw_8bit", model, **options_of(("galore_adamw_8bit", {})))
            engine = engine_of(model, optimizer, stage, world, **options)
            if number:
                engine.load_checkpoint(str(folder), "saved")
            go_on(engine, steps, rank, world)
            if len(parts) > number + 1:
                engine.save_checkpoint(str(folder), "saved")
        made.append(whole(model))
    return made[0], made[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_go_on_exactly(stage: int, tmp_path: Path) -> None:
    straight, again = run(resumed, 2, tmp_path, stage, {"bf16": {"enabled": True}})[0]
    for name, weight in straight.items():
        assert torch.equal(weight, again[name]), name


def turns(rank: int, world: int, stage: int, zero: dict[str, int]) -> tuple[float, int]:
    """LISA's distance from one process, and entries of moments of layers out of their turn."""
    made: list[tuple[dict[str, Tensor], list[list[int]]]] = []
    resting = 0
    for alone in (False, True):
        model = block()
        optimizer: Any = build("lisa_adamw", model, lr=1e-2, update_proj_gap=2, sampling="norm")
        drawn = []
        engine = None if alone else engine_of(model, optimizer, stage, world, zero=zero)
        for step in range(7):
            drawn.append(optimizer.active_blocks())
            if engine is None:
                train(model, optimizer, range(step, step + 1))
            else:
                go_on(engine, range(step, step + 1), rank, world)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        made.append((weights if engine is None else whole(model), drawn))
        if engine is not None:
            saved = optimizer.state_dict()
            rests = [g for g in saved["param_groups"] if g.get("block") is not None]
            rests = [g for g in rests if g["block"] not in optimizer.active_blocks()]
            states = [saved["state"][number] for g in rests for number in g["params"]]
            resting = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in states)
            assert states
    assert made[0][1] == made[1][1]
    assert len({tuple(active) for active in made[0][1]}) > 1
    return distance(made[0][0], made[1][0]), resting


def groups_and_refusals(rank: int, world: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage, zero in ((1, {}), (3, {"sub_group_size": 200})):
        weights = {}
        for alone in (False, True):
            model = block()
            keywords = options_of(("galore_adamw", {"stagger": True}))
            optimizer = build("galore_adamw", model, **keywords)
            optimizer.param_groups[0]["lr"] = 3e-3
            if alone:
                train(model, optimizer, range(9))
                weights[alone] = {n: p.detach().clone() for n, p in model.named_parameters()}
            else:
                go_on(engine_of(model, optimizer, stage, world, zero=zero), range(9), rank, world)
                weights[alone] = whole(model)
        found[f"stage {stage}"] = distance(weights[False], weights[True])
    found["turns"] = [turns(rank, world, 1, {}), turns(rank, world, 3, {"sub_group_size": 200})]
    said = []
    for prepare, options in (
        (lambda model, optimizer: train(model, optimizer, range(1)), {}),
        (lambda model, optimizer: None, {"zero": {"round_robin_gradients": True}}),
    ):
        model = block()
        optimizer = build("galore_adamw", model, **options_of(("galore_adamw", {})))
        prepare(model, optimizer)
        try:
            go_on(engine_of(model, optimizer, 2, world, **options), range(2), rank, world)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    model = nn.Sequential()
    model.mlp = nn.Linear(256, 64, bias=False)
    try:
        engine_of(model, build("galore_adamw", model, rank=4, weight_bits=8), 1, world)
    except ValueError as error:
        said.append(str(error))
    for options in ({}, {"bf16": {"enabled": True}}):
        model = block()
        optimizer = build("galore_adamw", model, **options_of(("galore_adamw", {})))
        optimizer.param_groups[0]["lr"] *= 1 + rank
        try:
            go_on(engine_of(model, optimizer, 0, world, **options), range(1), rank, world)
        except ValueError as error:
            said.append(str(error))
    found["said"] = said
    return found


@pytest.mark.slow
def test_several_groups_and_sub_groups_and_what_is_refused(tmp_path: Path) -> None:
    found, other = run(groups_and_refusals, 2, tmp_path)
    assert found["stage 1"] <= 1e-5
    assert found["stage 3"] <= 1e-5
    for gap, resting in found["turns"]:
        assert gap <= 1e-5
        assert resting == 0
    assert "taken a step before deepspeed.initialize" in found["said"][0]
    assert "accepted is round_robin_gradients=false" in found["said"][1]
    assert "a weight of shape (64, 256) in 8 bits: accepted are dense weights" in found["said"][2]
    assert len(found["said"]) == 5
    assert other["said"][3:] == found["said"][3:]
    for unequal in found["said"][3:]:
        assert "lr of group 0" in unequal
        assert "0.01 on process 0 and 0.02 on process 1 differ" in unequal
